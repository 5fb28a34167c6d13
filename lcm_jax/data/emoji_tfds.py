"""The shipped emoji set as a TFDS data set, `lcm_emoji`, in array_record files."""

import io

import tensorflow_datasets as tfds
from PIL import Image

from lcm_jax.data.emoji import SPLITS, STYLES, archives, read


class LcmEmoji(tfds.core.GeneratorBasedBuilder):
    """Captioned emoji of three styles, 64x64 px; features: image (PNG), text, style, key."""

    VERSION = tfds.core.Version('1.0.0')
    MODULE = __name__

    def _info(self):
        features = {
            'image': tfds.features.Image(shape=(64, 64, 3), encoding_format='png'),
            **dict.fromkeys(('text', 'style', 'key'), tfds.features.Text()),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        for style, archive in zip(STYLES, archives(split), strict=True):
            for sample in read(archive):
                png = io.BytesIO()
                Image.fromarray(sample.picture).save(png, 'PNG')
                key = f'{style}/{sample.key}'
                image = {'image': png.getvalue(), 'text': sample.caption}
                yield key, image | {'style': style, 'key': key}
