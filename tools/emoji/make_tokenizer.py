"""Make the emoji pipeline's tokenizer: CLIP's, with the merges that emoji captions need.

    python tools/emoji/make_tokenizer.py --data lcm_jax/emoji/data \
        --out lcm_jax/emoji/pipeline/tokenizer

needs OpenAI's `bpe_simple_vocab_16e6.txt.gz` (MIT), which `pip install --no-deps
open_clip_torch==3.3.0` brings.
A caption splits into the same pieces as with CLIP's whole vocabulary: a merge that byte pair
encoding never picks for a word can go without changing how the word is split. Words nobody
foresaw fall to smaller pieces, single letters at worst, never to an unknown token. The ids are
new: 256 bytes, 256 bytes that end a word, the kept merges in CLIP's order, start, end.
"""

import argparse
import gzip
import hashlib
import importlib.util
import itertools
import json
import tarfile
from pathlib import Path

from transformers import AutoTokenizer, CLIPTokenizer

START, END, WORD_END = '<|startoftext|>', '<|endoftext|>', '</w>'
MAX_LENGTH = 32  # tokens, with start and end
COMMON_MERGES = 1000  # CLIP's most frequent ones stay, whatever the captions say
VOCAB_SHA256, MERGES_SHA256 = '3f0c4f7d', '9fd691f7'  # of openai/clip-vit-large-patch14

# What people type into a prompt besides the words of the captions.
PROMPT_WORDS = """
a an the of with and or in on at by for from to as is are it its my your this that these those
no not very two three four five six seven eight nine ten one many some few single pair group
photo photograph picture image drawing painting sketch illustration icon logo sticker sign symbol
emoji emoticon cartoon clipart vector render rendering 3d 2d flat glossy shiny matte style styled
minimal simple detailed cute kawaii realistic abstract pixel art background foreground isolated
white black red green blue yellow orange purple pink brown grey gray gold golden silver bronze
beige cyan teal turquoise magenta violet indigo maroon navy olive lime crimson scarlet coral
dark light bright pale pastel neon colorful colourful color colour transparent striped spotted
big small tiny large huge giant little tall short long wide thin thick fat round square oval
old young new ancient modern fresh clean dirty broken hot cold warm cool wet dry soft hard
happy sad angry mad scared afraid surprised shocked excited bored tired sleepy sick calm crazy
silly funny shy proud lonely jealous worried nervous confused smiling laughing crying winking
kissing screaming sleeping dreaming thinking blushing smile laugh grin frown tears tongue wink
running walking jumping sitting standing dancing singing eating drinking playing flying swimming
driving riding holding wearing looking waving pointing clapping cooking reading writing working
man woman boy girl baby child kid person people family mother father brother sister friend king
queen prince princess knight wizard witch pirate ninja robot alien monster ghost zombie vampire
dragon unicorn mermaid fairy angel devil santa superhero astronaut doctor nurse teacher farmer
cook chef police officer firefighter soldier judge scientist artist singer dancer athlete
dog puppy cat kitten mouse rat hamster rabbit bunny fox bear panda koala tiger lion cow pig frog
monkey gorilla chicken hen rooster chick bird penguin duck eagle owl bat wolf horse zebra deer
giraffe elephant rhino hippo camel sheep goat llama kangaroo squirrel hedgehog otter beaver
snake lizard turtle tortoise crocodile dinosaur whale dolphin shark fish octopus squid crab
lobster shrimp jellyfish snail butterfly caterpillar bee ant bug beetle ladybug spider scorpion
fly mosquito worm parrot swan peacock flamingo crow raven seal walrus raccoon skunk sloth
flower rose tulip daisy sunflower lily lotus tree pine palm cactus leaf leaves grass plant
mushroom forest jungle garden mountain hill desert beach island ocean sea lake river waterfall
sky sun moon star stars cloud clouds rain rainbow snow snowflake snowman wind storm lightning
fire flame water ice earth planet comet galaxy space sunrise sunset night day morning evening
summer winter spring autumn fall weather world globe map
apple banana grape grapes cherry strawberry blueberry raspberry lemon lime melon watermelon peach
pear pineapple mango coconut kiwi avocado tomato potato carrot corn pepper cucumber broccoli
garlic onion bread toast bagel pretzel croissant cheese egg bacon meat steak burger hamburger
fries pizza sandwich taco burrito salad soup noodles rice sushi pasta spaghetti curry cake
cupcake pie cookie donut doughnut chocolate candy lollipop honey icecream cream milk coffee tea
juice beer wine cocktail bottle cup glass mug plate bowl fork knife spoon
car bus taxi truck van train tram bicycle bike motorcycle scooter boat ship sailboat airplane
plane helicopter rocket spaceship ufo balloon road street bridge house home building castle tower
church school hospital hotel shop store city town tent statue fountain
ball football soccer basketball baseball tennis volleyball golf hockey skate ski surfboard medal
trophy game dice chess puzzle toy doll kite guitar piano violin drum trumpet saxophone microphone
headphones radio music note phone telephone computer laptop keyboard printer screen television
camera video film clock watch alarm battery lamp lightbulb candle flashlight book newspaper
letter envelope mail package box gift present key lock door window chair bed couch sofa bath
toilet shower soap brush broom bucket basket bag backpack suitcase umbrella hat cap crown ring
necklace glasses sunglasses shirt dress skirt pants jeans socks shoe shoes boots coat scarf
gloves ribbon flag money coin dollar card credit bank bomb gun sword shield axe hammer wrench
scissors pen pencil paint palette magnet compass telescope microscope needle pill syringe
heart hearts love peace hand hands finger thumb fist arm leg foot ear eye eyes nose mouth lips
teeth hair head face body brain bone skull muscle blood arrow circle triangle heart diamond cross
check mark question exclamation number plus minus warning danger stop recycle zodiac
anxiety avalanche bigfoot brass chemotherapy correct curls debate disaster distorted drinks
feelings fixed flamenco forgive frustration furious fury future gamer games girls gone gratitude
groove gym hairy heavenly hilarious horses icicles identical immortal impressed innocent introvert
invention invisible irritated islands jewels journey kingdom knuckle landscape lettuce loot losing
lost lover loving lunch margarita marine martini mean meditate melt merry mild million mischievous
mudslide multitask mustache mythology outgoing painter patience perfect pipe pixelated plankton
player portobello pouch pour prayed pride protect purity push rage raise range rebirth recorder
redhead refreshing regret relationship renewal repair revival ride ripe roar rocks rowboat royalty
rush safari salon salsa sarcastic sassy savor scholar scream serene serious serenity serve shades
shock shrub sierra sigh silence sir sisters skeptical skill skin slate sliding slipper smartphone
smelly smiley smug sneaker snicker sob somersault soothe sorry sort soulmate soybean spa spark
special speechless spell spice spill spin spinning spirit stain stare stealth stiletto stinky
stress strong stubborn study suburbia sunshine surprise suspicious swag sweating sympathy talisman
tango target tasty tension tentacles tequila text theater therapy thoughts throw tick tipsy tomb
tombstone toppings toss trace trans treatment triathlon triumph trombone tropics trouble trousers
true truffle trunk truth turnip twin typing uncomfortable undercover underwater unhappy unimpressed
union united unlucky unreal unsure unwind upward vegetarian veggie vulnerable wacky waiting wallet
wealth weight weightlifter weird wheat whisper whistle winning wishes wonder wondering workout
worldwide worry wow wrestle xmas yawn yay yikes yoga yum yummy zest zip lol rofl omg hey maybe
whatever sure please best beautiful pretty elegant fancy wild tame furry fluffy feathery wooden
metal plastic paper stone steel leather fabric crystal sparkling glowing sparkle shining burning
frozen melting floating upside down left right front side top bottom inside outside under over
behind next between japanese chinese mexican italian french indian american british korean arabic
african european
"""


def full_vocabulary():
    """CLIP's whole vocabulary -> {piece: id}, [(left, right)]; ValueError if it is another one."""
    package = importlib.util.find_spec('open_clip').submodule_search_locations[0]
    with gzip.open(Path(package) / 'bpe_simple_vocab_16e6.txt.gz', 'rt', encoding='utf-8') as file:
        lines = file.read().split('\n')
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    vocab = vocabulary(merges)
    for text, expected in (
        (vocab_text(vocab), VOCAB_SHA256),
        (merges_text(merges), MERGES_SHA256),
    ):
        found = hashlib.sha256(text.encode()).hexdigest()
        if not found.startswith(expected):
            raise ValueError(f"not CLIP's vocabulary: sha256 {found[:8]}, expected {expected}")
    ids = clip_tokenizer(vocab, merges, max_length=77)('a photo of a cat').input_ids
    if ids != [49406, 320, 1125, 539, 320, 2368, 49407]:
        raise ValueError(f"'a photo of a cat' is {ids}")
    return vocab, merges


def byte_symbols():
    """The 256 printable symbols that stand for bytes, in GPT-2's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def vocabulary(merges):
    """{piece: id}: bytes, word-ending bytes, one piece a merge, start, end."""
    pieces = byte_symbols()
    pieces += [piece + WORD_END for piece in pieces]
    pieces += [left + right for left, right in merges] + [START, END]
    return {piece: index for index, piece in enumerate(pieces)}


def vocab_text(vocab):
    return json.dumps(vocab, ensure_ascii=False)


def merges_text(merges):
    return '#version: 0.2\n' + ''.join(f'{left} {right}\n' for left, right in merges)


def clip_tokenizer(vocab, merges, max_length):
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def words_in(text, tokenizer):
    """The words of a text as tuples of byte symbols, the last one with </w>."""
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(text)
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [(*word[:-1], word[-1] + WORD_END) for word in words]


def merges_of(word, ranks):
    """The ranks of the merges that byte pair encoding picks for one word."""
    pieces, used = list(word), set()
    while True:
        pairs = itertools.pairwise(pieces)
        rank, pair = min(((ranks[p], p) for p in pairs if p in ranks), default=(None, None))
        if pair is None:
            return used
        used.add(rank)
        merged, index = [], 0
        while index < len(pieces):
            step = 2 if tuple(pieces[index : index + 2]) == pair else 1
            merged.append(''.join(pieces[index : index + step]))
            index += step
        pieces = merged


def trimmed(merges, texts, tokenizer):
    """The first COMMON_MERGES merges and those that the texts' words need, in order."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    kept = set(range(COMMON_MERGES))
    for word in {word for text in texts for word in words_in(text, tokenizer)}:
        kept |= merges_of(word, ranks)
    return [merges[rank] for rank in sorted(kept)]


def read_captions(folder):
    captions = []
    for path in sorted(folder.glob('*.tar.gz')):
        with tarfile.open(path) as tar:
            texts = [member for member in tar if member.name.endswith('.txt')]
            captions += [tar.extractfile(member).read().decode() for member in texts]
    if not captions:
        raise FileNotFoundError(f'no captions in {folder}/*.tar.gz: run make_data.py first')
    return captions


def write_folder(out, vocab, merges):
    """A CLIPTokenizer folder, with Stable Diffusion's special tokens."""
    special = {'bos_token': START, 'eos_token': END, 'unk_token': END, 'pad_token': END}
    config = {
        'add_prefix_space': False,
        'do_lower_case': True,
        'errors': 'replace',
        'model_max_length': MAX_LENGTH,
        'tokenizer_class': 'CLIPTokenizer',
        **special,
    }
    files = {
        'vocab.json': vocab_text(vocab),
        'merges.txt': merges_text(merges),
        'tokenizer_config.json': json.dumps(config, indent=2) + '\n',
        'special_tokens_map.json': json.dumps(special, indent=2) + '\n',
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (out / name).write_text(text, encoding='utf-8', newline='\n')


def check(out, full, captions):
    """Compare the written folder with CLIP's whole vocabulary -> token counts of the captions."""
    counts = []
    for tokenizer in (CLIPTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(out)):
        ids = tokenizer(captions).input_ids
        for caption, found, expected in zip(captions, ids, full(captions).input_ids, strict=True):
            pieces = tokenizer.convert_ids_to_tokens(found)
            if pieces != full.convert_ids_to_tokens(expected):
                raise AssertionError(f'{caption!r} splits into {pieces}')
        counts = [len(row) for row in ids]
        for text in ('Xylographer QZJV, ünïcödé 漢字 \U0001fae8', ' '.join(['zzyzx'] * 40), ''):
            padded = tokenizer(
                text, padding='max_length', max_length=tokenizer.model_max_length, truncation=True
            ).input_ids
            end = tokenizer.eos_token_id
            body = padded[1 : padded.index(end)]
            if len(padded) != MAX_LENGTH or set(padded[1 + len(body) :]) != {end}:
                raise AssertionError(f'{text!r} pads to {padded}')
            if len(body) < MAX_LENGTH - 2 and tokenizer.decode(body).strip() != text.lower():
                raise AssertionError(f'{text!r} comes back as {tokenizer.decode(body)!r}')
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', type=Path, required=True, help='folder of the tars')
    parser.add_argument('--out', type=Path, required=True, help='tokenizer folder to write')
    args = parser.parse_args()

    vocab, merges = full_vocabulary()
    full = clip_tokenizer(vocab, merges, max_length=77)
    captions = read_captions(args.data)
    merges = trimmed(merges, [*captions, PROMPT_WORDS], full)
    vocab = vocabulary(merges)
    write_folder(args.out, vocab, merges)
    counts = check(args.out, full, captions)
    print(
        f'{len(vocab)} pieces; {len(captions)} captions of {sum(counts) / len(counts):.1f} '
        f'tokens on average, {max(counts)} at most'
    )


if __name__ == '__main__':
    main()
