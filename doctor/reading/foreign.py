"""Files of other programs: their names, and the way to their weights.

    found = by_container("model.safetensors")     # by its first bytes or its zip's names; or None
    found = by_keys(path, {"model_args", "model", "iter_num"})
    found = by_folder("bert-base-uncased")
    found.text, found.way                         # "a nanoGPT checkpoint", a line of Python

Nothing is loaded: they are recognised by names, keys and first bytes. A `way` is what a user types.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatch

from doctor.reading.summary import Problem

LOAD = "torch.load({path!r}, map_location='cpu', weights_only=True)"
ZERO = "python zero_to_fp32.py . weights, in the folder where DeepSpeed left that script"
SAFETENSORS = "safetensors.torch.load_file({path!r})"
SHARED = "python train_rvq.py --init-from {path}, or sample_rvq.py {path}"
HUGGING_FACE = ("pytorch_model*.bin", "model*.safetensors", "adapter_model.*")

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
    (HUGGING_FACE, "a Hugging Face model",
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


def _foreign(name: str, way: str, path: str) -> Problem:
    return Problem("foreign", name, way.format(path=path))


def by_container(path: str) -> Problem | None:
    """By its first bytes, or by the names in it if it is a zip; None for what torch.save writes."""
    with open(path, "rb") as file:
        head = file.read(1 << 20)
    # Before the first bytes of others: the length of a header may begin with any byte.
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= length <= os.path.getsize(path) - 8:
        if b'"rvq-weights"' in head[: length + 8]:
            name = "weights that this trainer shares (.safetensors): the best average, and no run"
            return _foreign(name, SHARED, path)
        return _foreign(_of_hugging_face(path) or "weights (.safetensors)", SAFETENSORS, path)
    for magic, name, way in MAGIC:
        if head.startswith(magic):
            return _foreign(name, way, path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        for patterns, name, way in ARCHIVES:
            if all(any(fnmatch(n, pattern) for n in names) for pattern in patterns):
                return _foreign(name, way, path)
    return None


def _of_hugging_face(path: str) -> str:
    of_it = any(fnmatch(os.path.basename(path), pattern) for pattern in HUGGING_FACE)
    return "the weights of a Hugging Face model" if of_it else ""


def by_keys(path: str, keys: Iterable[str], *, bare: bool = False) -> Problem:
    """By the keys of its dictionary; `bare` if its values are the weights themselves."""
    known = set(keys)
    for needed, name, way in KEYS:
        if needed <= known:
            return _foreign(name, way, path)
    if bare:
        is_ours = {"blocks"} < {n.split(".")[0] for n in known} & {"blocks", "embed", "embeds"}
        what = " of this trainer's kind of model" if is_ours else ""
        return _foreign(_of_hugging_face(path) or f"a bare state_dict{what}", LOAD, path)
    return _foreign("no checkpoint: no dictionary of weights", "it holds none that are known", path)


def by_folder(path: str) -> Problem | None:
    """By the names of the files in a folder."""
    names = sorted(os.listdir(path))
    for patterns, name, way in FOLDERS:
        if any(fnmatch(n, pattern) for n in names for pattern in patterns):
            return _foreign(name, way, path)
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
