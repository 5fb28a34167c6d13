"""Where arrays lie: a mesh of devices, path rules -> shardings, and each process's part of a batch."""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lcm_jax.errors import InputError
from lcm_jax.tree import first_match, map_named

AXES = 'data', 'fsdp', 'tensor'
BATCH = 'data', 'fsdp'  # the axes that divide a batch

# Megatron's pairs (arXiv 1909.08053): `tensor` divides the outputs of the first of two products and
# the inputs of the second, so that nothing needs to be sent between them. `fsdp` divides what is left.
_COLUMNS = (
    r'.*(to_q|to_k|to_v|ff\.net\.0\.proj|conv1|time_emb_proj|linear_1|cond_proj|q_proj|k_proj|v_proj|'
    r'mlp\.fc1|fc1)/kernel'
)
# A convolution's kernel has both axes at one dimension: XLA's partitioner (jax 0.10.2) gets the order of
# the samples wrong where the other one, or the other's gradient, is divided by an axis of the batch.
_CONV = r'.*(conv\w*|proj_in|proj_out)/kernel'
_BOTH = 'tensor', 'fsdp'
# (regex of the whole path, mesh axes of the last dimensions); the first match counts. Base weights,
# adapters ('.../kernel/down'), their moments and their average have the same names at the end.
RULES = (
    (r'.*conv1/kernel', (None, _BOTH)),
    (_CONV, (_BOTH, None)),
    (_CONV + '/down', (_BOTH, None)),
    (_COLUMNS, ('fsdp', 'tensor')),
    (_COLUMNS + '/down', ('fsdp', None)),
    (_COLUMNS + '/up', ('fsdp', 'tensor')),
    ('.*/kernel', ('tensor', 'fsdp')),
    ('.*/kernel/down', ('tensor', 'fsdp')),
    ('.*/kernel/up', (None, 'fsdp')),
    ('.*/embedding', ('tensor', 'fsdp')),
    ('.*', ()),
)


def make_mesh(data=-1, fsdp=1, tensor=1, dcn=1, devices=None):
    """-> Mesh of axes 'data', 'fsdp' and 'tensor' over `devices` (all there are).

    One size may be -1: as many as are left. dcn: how many groups of devices (TPU slices; processes
    elsewhere) are joined by a slower network, at least as many as the devices say themselves; they divide
    'data', which alone crosses it. Raises InputError for sizes that do not multiply to the number of
    devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {'data': data, 'fsdp': fsdp, 'tensor': tensor}
    wrong = [f'{k} = {n}' for k, n in (sizes | {'dcn': dcn}).items() if n < 1 and (n, k) != (-1, k)]
    if wrong or dcn < 1 or sum(n == -1 for n in sizes.values()) > 1:
        raise InputError(f'mesh {sizes}, dcn {dcn}: sizes of 1 or more; one but dcn may be -1')
    known = math.prod(n for n in sizes.values() if n > 0)
    sizes = {k: len(devices) // known if n == -1 else n for k, n in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise InputError(
            f'mesh {" x ".join(f"{k} {n}" for k, n in sizes.items())}: {len(devices)} devices; the '
            'sizes must multiply to that'
        )
    shape, slices = tuple(sizes.values()), {_slice(d) for d in devices}
    dcn = max(dcn, len(slices))
    if sizes['data'] % dcn or (len(slices) > 1 and dcn % len(slices)):
        raise InputError(
            f'mesh.dcn = {dcn}: must divide data = {sizes["data"]}, and be a multiple of the '
            f'{len(slices)} slices that the devices form'
        )
    return Mesh(_arranged(shape, dcn, devices, len(slices)), AXES, axis_types=(AxisType.Auto,) * 3)


def _slice(device):
    """Which TPU slice a device is in. GPUs have such a number too, of their host, and need not heed it."""
    return getattr(device, 'slice_index', 0) if device.platform == 'tpu' else 0


def _arranged(shape, dcn, devices, slices):
    """Devices in an array of this shape, neighbours in it near each other."""
    if devices[0].platform == 'tpu' and getattr(devices[-1], 'core_on_chip', 0):
        return np.array(devices).reshape(shape)  # two cores a chip, as in TPU v2 and v3
    split = {'allow_split_physical_axes': True}
    if dcn == 1:
        return mesh_utils.create_device_mesh(shape, devices, **split)
    try:
        return mesh_utils.create_hybrid_device_mesh(
            (shape[0] // dcn, *shape[1:]),
            (dcn, 1, 1),
            devices,
            process_is_granule=slices == 1,
            **split,
        )
    except ValueError as e:
        raise InputError(f'dcn = {dcn}: {e}') from e


def local_mesh():
    """This process's own devices along 'data', to share its work among; None if it has one."""
    devices = jax.local_devices()
    return Mesh(np.array(devices), ('data',)) if len(devices) > 1 else None


def shardings(tree, mesh, rules=RULES):
    """Tree of arrays or ShapeDtypeStructs -> tree of NamedSharding.

    rules: ((regex of the whole path, (axes of the second to last, of the last dimension)), ...). A
    dimension's axes are a name, a tuple of names or None; those that do not divide it leave it
    whole. Raises InputError for a leaf that no rule matches and for an axis that the mesh lacks.
    """
    for rule in rules:
        match rule:
            case (str(pattern), tuple(axes) | list(axes)):
                pass
            case _:
                raise InputError(f'rule {rule!r}; one is (regex, (axis or None, ...))')
        strange = {*map(str, _names(axes))} - {*mesh.axis_names}
        if strange:
            raise InputError(
                f'rule {pattern!r} names {", ".join(strange)}; the mesh has {mesh.axis_names}'
            )
    return map_named(lambda path, x: _place(x.shape, mesh, first_match(rules, path)), tree)


def _names(axes):
    return [a for axis in axes if axis for a in ((axis,) if isinstance(axis, str) else axis)]


def _place(shape, mesh, axes):
    """The last axes of the rule at the last dimensions, each that the mesh divides."""
    axes = axes[max(0, len(axes) - len(shape)) :]
    spec = [None] * (len(shape) - len(axes))
    for axis, n in zip(axes, shape[len(spec) :], strict=True):
        parts = math.prod(mesh.shape[a] for a in _names((axis,)))
        spec.append(axis if parts > 1 and n % parts == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def placed(tree, mesh, rules=RULES):
    """Tree of arrays or ShapeDtypeStructs -> tree of ShapeDtypeStructs that lie where the rules say."""
    return jax.tree.map(
        lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home),
        tree,
        shardings(tree, mesh, rules),
    )


def groups(mesh):
    """How many parts a batch has: devices along 'tensor' share one."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_sharding(mesh):
    """Of arrays [B, ...]: their rows over 'data' and 'fsdp'."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def homes(tree):
    """Tree of arrays or `placed` shapes -> tree of their shardings."""
    return jax.tree.map(lambda x: x.sharding, tree)


def replicated(mesh):
    """Of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put(x, home):
    """An array that every process has whole -> the same, lying as `home` says."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, home, lambda index: x[index])


def local_rows(sharding, batch):
    """-> [n] int, ascending: the rows of a global batch that this process's devices hold.

    Raises InputError for a batch that the sharding does not divide.
    """
    try:
        held = sharding.addressable_devices_indices_map((batch,)).values()
    except ValueError as e:
        axes = {axis: sharding.mesh.shape[axis] for axis in BATCH}
        raise InputError(f'batch {batch}: not a multiple of the mesh, {axes}') from e
    return np.unique([i for (rows,) in held for i in range(*rows.indices(batch))]).astype(int)


def to_global(arrays, sharding, rows, batch):
    """Tree of numpy arrays [n, ...] that hold `rows` (see `local_rows`) -> tree of jax.Array [batch, ...]."""

    def one(x):
        def part(index):
            first = np.searchsorted(rows, range(*index[0].indices(batch)))
            return x[first][:, *index[1:]]

        return jax.make_array_from_callback((batch, *x.shape[1:]), sharding, part)

    return jax.tree.map(one, arrays)
