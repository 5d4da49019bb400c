"""The codec's vectors that a new model begins from: found, learned with, kept, folded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from kit.checkpoints import assert_same_tensors, comparable
from kit.models import make_codes, make_model
from kit.trainer import ROOT, make_run, rows, train

import ckpt_doctor
from cli.command_line import EXIT_DONE
from model import PATTERNS, ModelConfig
from run_folder.checkpoint import load_checkpoint
from run_folder.files import save_checkpoint
from run_folder.shared_weights import export_weights, load_parts
from sample_rvq import NEEDED
from sound.codec import codebook_vectors
from sound.npq_format import map_codes, read_header, write_npq
from sound.sampling import Draw, generate, load_model

TRACK = ROOT / "examples" / "tokens" / "val" / "freedoom1_e1m8.npq"
LATEST = "rvq_9cb_latest.pt"
NONE_LINE = "codes    of no codec at hand"


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames of a track of the bundled codec, in two files."""
    folder = tmp_path_factory.mktemp("music")
    codes = np.array(map_codes(read_header(TRACK)))
    for i, part in enumerate((codes[:6000], codes[6000:7500])):
        save(folder / f"{i}.npq", part)
    return folder


def save(path: Path, codes: np.ndarray, frame_rate: float = 86.1328125) -> None:
    path.parent.mkdir(exist_ok=True)
    write_npq(path, codes, vocab_sizes=[1024] * codes.shape[1], frame_rate=frame_rate)


def test_the_codec_of_the_codes_is_found_and_its_vectors_are_learned_with(music, tmp_path, capsys):
    flags = ("--data", music, "--max-steps", "60", "--lr", "2e-4")
    known = train(*flags, "--save_dir", tmp_path / "known")
    assert "codes    begin from the vectors of codec demo, in which" in capsys.readouterr().out
    unknown = train(*flags, "--save_dir", tmp_path / "unknown", "--no-code-vectors")
    assert "codes    " not in capsys.readouterr().out
    vectors, frame_rate = codebook_vectors("demo")
    assert frame_rate == pytest.approx(86.13, abs=0.01)
    features = known["model"]["head.vectors"]
    assert features.shape == (9, 1024, 17)
    torch.testing.assert_close(features.mean(1), torch.zeros(9, 17), atol=1e-4, rtol=0)
    own = vectors - vectors.mean(1, keepdim=True)
    torch.testing.assert_close(features[..., :8], own / own.std(1, keepdim=True))
    assert torch.equal(known["ema"]["depth.embed.vectors"], features[:8])
    assert "head.vectors" not in unknown["model"]
    val, without = (rows(tmp_path / x, "epoch")[-1]["val"] for x in ("known", "unknown"))
    assert val < without - 0.05


@pytest.mark.parametrize("how", ["random", "other codec", "other rate", "another vocabulary"])
def test_codes_of_another_codec_are_not_taken_for_its(how, music, tmp_path, capsys):
    codes = np.array(map_codes(read_header(music / "0.npq"))).astype(np.int64)
    rng, rate = np.random.default_rng(0), 86.1328125
    if how == "random":
        codes = rng.integers(1024, size=codes.shape)
    if how == "other codec":  # the same music, and entries in another order
        codes = rng.permutation(1024)[codes]
    path = tmp_path / "data" / "a.npq"
    save(path, codes, 75.0 if how == "other rate" else rate)
    if how == "another vocabulary":
        write_npq(path, codes, vocab_sizes=[1025] * 9, frame_rate=rate)
    run = make_run("--data", path, "--save_dir", tmp_path / "run")
    said = capsys.readouterr().out
    assert NONE_LINE in said
    assert said.count("44khz") <= 1, "each codec is tried and named once"
    assert run.state.model.config.code_features == 0


def test_a_resume_needs_no_codec_and_ends_in_the_same_weights(music, tmp_path, capsys):
    flags = ("--data", music, "--max-steps", "12")
    whole = train(*flags, "--save_dir", tmp_path / "whole")
    cut = ("--save_dir", tmp_path / "cut")
    train(*flags, *cut, stop_at=5)
    capsys.readouterr()
    assert_same_tensors(comparable(train(*flags, *cut)), comparable(whole))
    assert "codes    " not in capsys.readouterr().out
    old = load_checkpoint(tmp_path / "cut" / LATEST)
    del old["flags"]["code_vectors"]
    save_checkpoint(old, tmp_path / "cut" / LATEST)
    assert make_run(*flags, *cut).flags.code_vectors is False


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_rows_of_codes_decay_and_an_older_run_goes_on_as_it_was(optim, music, tmp_path):
    flags = ("--data", music, "--save_dir", tmp_path, "--optim", optim)
    rows_of_codes = {"embed.weight", "depth.embed.weight", "head.weight"}

    def decays(run) -> dict[str, float]:
        groups = run.state.optimizer.state_dict()["param_groups"]
        return {n: g["weight_decay"] for g in groups for n in g["param_names"]}

    checkpoint = train(*flags, stop_at=3)
    now = make_run(*flags)
    assert {n for n, decay in decays(now).items() if decay == now.flags.row_decay} == rows_of_codes
    rate = max(g["lr_factor"] for g in now.state.optimizer.param_groups[-2:]) * now.flags.lr
    steps_a_pass = now.train_windows.frames / (now.windows_per_step * now.flags.ctx)
    assert now.flags.row_decay * rate == pytest.approx(1 / steps_a_pass, rel=0.01)
    off = make_run(*flags, "--row-decay", "0")
    assert {n for n, decay in decays(off).items() if decay} >= {"head.weight"}
    assert max(decays(off).values()) == decays(off)["head.weight"] == 0.02
    moments = {
        name: off.state.optimizer.state_dict()["state"][index]
        for group in off.state.optimizer.state_dict()["param_groups"]
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }
    for group in checkpoint["optimizer"]["param_groups"]:
        for name, index in zip(group["param_names"], group["params"], strict=True):
            assert_same_tensors(moments[name], checkpoint["optimizer"]["state"][index])
    del checkpoint["flags"]["row_decay"]
    save_checkpoint(checkpoint, tmp_path / LATEST)
    assert make_run(*flags).flags.row_decay == 0.0
    assert decays(make_run(*flags)) == decays(off)


def test_weights_to_begin_from_decide(music, tmp_path, capsys):
    train("--data", music, "--save_dir", tmp_path / "a", "--max-steps", "2", "--no-code-vectors")
    initial = ("--init-from", tmp_path / "a" / LATEST)
    run = make_run("--data", music, "--save_dir", tmp_path / "b", *initial)
    assert run.state.model.config.code_features == 0
    assert "codes    " not in capsys.readouterr().out


def test_side_columns_have_the_vectors_of_the_codecs_first(music, tmp_path):
    codes = np.array(map_codes(read_header(music / "0.npq")))[:, [*range(8), 0]]
    path = tmp_path / "a.npq"
    write_npq(path, codes, vocab_sizes=[1024] * 9, frame_rate=86.1328125, side_codebooks=1)
    features = make_run("--data", path, "--save_dir", tmp_path / "run").state.model.head.vectors
    assert torch.equal(features[8], features[0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_folded_a_model_is_the_same_and_shares_all_else(pattern):
    config = ModelConfig((8, 5, 8), 32, 2, 2, pattern=pattern, code_features=3)
    model, codes = make_model(config).eval(), make_codes(config, 2, 9)
    torch.manual_seed(0)
    model.learn_vectors(torch.randn(3, 8, 3))
    with torch.no_grad():
        for module in (model.embed, model.head, *([model.depth.embed] if model.depth else [])):
            module.proj.normal_()
            for i, row in enumerate(module.rows()):
                k, code = divmod(i, 8)
                slow = module.weight[i] + module.vectors[k, code] @ module.proj[k]
                torch.testing.assert_close(row, slow)
    folded = model.folded()
    torch.testing.assert_close(folded(codes), model(codes))
    assert folded.blocks[0].mlp.up.weight is model.blocks[0].mlp.up.weight
    assert folded.embed.proj is None
    assert model.embed.proj is not None
    draws = {"ctx": 8, "draw": Draw.of(3)}
    assert torch.equal(generate(model, 12, **draws), generate(folded, 12, **draws))


def test_shared_weights_and_the_doctor_know_them(music, tmp_path, capsys):
    checkpoint = train("--data", music, "--save_dir", tmp_path, "--max-steps", "20")
    assert ckpt_doctor.main([str(tmp_path)]) == EXIT_DONE, capsys.readouterr().out
    shared = tmp_path / "w.safetensors"
    export_weights(checkpoint, shared, tell=print)
    cpu = torch.device("cpu")
    one, other = (
        load_model(load_parts(path, needed=NEEDED), str(path), raw=False, device=cpu).state_dict()
        for path in (shared, tmp_path / LATEST)
    )
    assert_same_tensors(one, other)
    checkpoint["model"]["head.vectors"][0, 0, 0] = torch.nan
    broken = tmp_path / "broken" / LATEST
    broken.parent.mkdir()
    save_checkpoint(checkpoint, broken)
    capsys.readouterr()
    assert ckpt_doctor.main([str(broken)]) != EXIT_DONE
    assert "head.vectors is not finite" in capsys.readouterr().out
