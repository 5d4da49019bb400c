"""Files of other programs: their names, and the way to their weights.

    found = by_container("model.safetensors")     # by its first bytes or its zip's names; or None
    found = by_keys(path, {"model_args", "model", "iter_num"})
    found = by_folder("bert-base-uncased")
    found.name, found.way                         # "a nanoGPT checkpoint", a line of Python

Nothing is loaded: they are recognised by names, keys and first bytes. A `way` is what a user types.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import NamedTuple


class Foreign(NamedTuple):
    """What a file is, and how to get at its weights."""

    name: str
    way: str


LOAD = "torch.load({path!r}, map_location='cpu', weights_only=True)"
ZERO = "python zero_to_fp32.py . weights, in the folder where DeepSpeed left that script"
SAFETENSORS = "safetensors.torch.load_file({path!r})"

# First bytes; the name of such a file; the way to its content.
MAGIC = (
    (b"NPQ1", "codes (.npq): the data of a run", "name it after --data or --probe-data"),
    (b"NPQ2", "codes (.npq): the data of a run", "name it after --data or --probe-data"),
    (b"\x93NUMPY", "one NumPy array (.npy)", "numpy.load({path!r})"),
    (b"GGUF", "a GGUF model of llama.cpp", "gguf.GGUFReader({path!r}).tensors"),
    (b"\x89HDF", "an HDF5 file, such as of Keras", "h5py.File({path!r})"),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19",
     "a file of torch < 1.6 or of its old serialisation",
     f"torch.save({LOAD}, 'new.pt') writes it anew"),
    (b"\x80", "a plain Python pickle, which can run code when it is opened",
     "pickle.load(open({path!r}, 'rb')), only if you trust its source"),
)  # fmt: skip

# Names in a zip, all of which such an archive has.
ARCHIVES = (
    (("*.npy",), "NumPy arrays (.npz)", "numpy.load({path!r})"),
    (("*/constants.pkl", "*/code/*"), "a TorchScript model",
     "torch.jit.load({path!r}).state_dict()"),
    (("*.data/extern_modules",),
     "a torch.package archive, which runs Python code of its own when it is opened",
     "torch.package.PackageImporter({path!r}), only if you trust its source"),
)  # fmt: skip

# Keys, all of which such a checkpoint has; the most telling first.
KEYS = (
    ({"pytorch-lightning_version"}, "a PyTorch Lightning checkpoint", f"{LOAD}['state_dict']"),
    ({"ds_version"}, "one rank's part of a DeepSpeed checkpoint",
     f"{ZERO}; without ZeRO {LOAD}['module']"),
    ({"model_args", "iter_num"}, "a nanoGPT checkpoint", f"{LOAD}['model']"),
    ({"best_state", "xp.cfg"}, "an audiocraft checkpoint", f"{LOAD}['best_state']"),
    ({"checkpoint_version", "iteration"}, "a Megatron-LM checkpoint", f"{LOAD}['model']"),
    ({"state_dict", "metadata"}, "the weights of a codec",
     "name it after --codec of encode_npq.py or sample_rvq.py"),
    ({"state", "param_groups"}, "the state of an optimizer, without weights", LOAD),
    ({"model_state_dict"}, "a checkpoint of another program", f"{LOAD}['model_state_dict']"),
    ({"state_dict"}, "a checkpoint of another program", f"{LOAD}['state_dict']"),
    ({"model"}, "a checkpoint of another program", f"{LOAD}['model']"),
)  # fmt: skip

# Names in a folder, one of which such a folder has.
FOLDERS = (
    (("zero_to_fp32.py", "global_step*", "*_model_states.pt"), "a DeepSpeed checkpoint", ZERO),
    (("model*.safetensors", "pytorch_model*.bin", "adapter_model.*"), "a Hugging Face model",
     "transformers.AutoModel.from_pretrained({path!r}).state_dict()"),
    (("*.distcp",), "a torch.distributed checkpoint",
     "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pt"),
)  # fmt: skip
WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DistributedDataParallel"}
LIBRARIES = re.compile(  # whose classes pickles of checkpoints name, to hold settings
    r"(pytorch_lightning|lightning(_fabric)?|lightning_utilities|deepspeed|transformers|accelerate"
    r"|omegaconf|megatron|fairseq|peft|torchmetrics)\..*"
    r"|pathlib\.(Pure)?(Posix|Windows)?Path|typing\.Any|torch\.optim\.lr_scheduler\.\w+"
    r"|collections\.Counter|numpy\._?core\.multiarray\._reconstruct|numpy\.ndarray"
)


def by_container(path: str) -> Foreign | None:
    """By its first bytes, or by the names in it if it is a zip; None for what torch.save writes."""
    with open(path, "rb") as file:
        head = file.read(16)
    for magic, name, way in MAGIC:
        if head.startswith(magic):
            return Foreign(name, way.format(path=path))
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= length <= os.path.getsize(path) - 8:
        return _safetensors(path, length)
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for patterns, name, way in ARCHIVES:
        if all(any(fnmatch(n, pattern) for n in names) for pattern in patterns):
            return Foreign(name, way.format(path=path))
    return None


def _safetensors(path: str, length: int) -> Foreign:
    with open(path, "rb") as file:
        header = file.read(min(length + 8, 1 << 20))
    if b'"rvq-weights"' in header:
        name = "weights that this trainer shares (.safetensors): the best average, and no run"
        return Foreign(name, f"python train_rvq.py --init-from {path}, or sample_rvq.py {path}")
    name = _of_hugging_face(path) or "weights (.safetensors)"
    return Foreign(name, SAFETENSORS.format(path=path))


def _of_hugging_face(path: str) -> str:
    names = r"pytorch_model.*\.bin|model.*\.safetensors|adapter_model\..*"
    is_one = re.fullmatch(names, os.path.basename(path))
    return "the weights of a Hugging Face model" if is_one else ""


def by_keys(path: str, keys: Iterable[str], *, bare: bool = False) -> Foreign:
    """By the keys of its dictionary; `bare` if its values are the weights themselves."""
    known = set(keys)
    for needed, name, way in KEYS:
        if needed <= known:
            return Foreign(name, way.format(path=path))
    if bare:
        is_ours = {"blocks"} < {n.split(".")[0] for n in known} & {"blocks", "embed", "embeds"}
        what = " of this trainer's kind of model" if is_ours else ""
        name = _of_hugging_face(path) or f"a bare state_dict{what}"
        return Foreign(name, LOAD.format(path=path))
    return Foreign("no checkpoint: no dictionary of weights", "it holds none that are known")


def by_folder(path: str) -> Foreign | None:
    """By the names of the files in a folder."""
    names = sorted(os.listdir(path))
    for patterns, name, way in FOLDERS:
        if any(fnmatch(n, pattern) for n in names for pattern in patterns):
            return Foreign(name, way.format(path=path))
    return None


def prefix_of(names: Iterable[str]) -> str:
    """What a wrapper put before all names, such as "module._orig_mod."; "" if they differ."""
    listed, prefix = list(names), ""
    while listed and (
        word := next((w for w in WRAPPERS if all(n.startswith(prefix + w) for n in listed)), "")
    ):
        prefix += word
    return prefix


def wrapped_by(prefix: str) -> str:
    """The wrappers of a prefix by name."""
    return " and ".join(wrapper for word, wrapper in WRAPPERS.items() if word in prefix)


def unwrapping(names: Iterable[str]) -> str:
    """How to take a wrapper's prefix off names, as a part of a sentence; "" where there is none."""
    if not (prefix := prefix_of(names)):
        return ""
    return (
        f"; all names begin with `{prefix}` of {wrapped_by(prefix)}: name.removeprefix({prefix!r}) "
        "takes it off"
    )
