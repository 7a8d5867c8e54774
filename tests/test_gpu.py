"""benchmarks/gpu.py at toy size: its tables are complete, and it finds and names errors."""

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FEW_HEADS = ("energy", "flow", "sequential")


@pytest.fixture
def gpu(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def result_in(folder: Path) -> dict:
    (file,) = folder.glob("gpu_*.json")
    return json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def table_in(folder: Path) -> str:
    (file,) = folder.glob("gpu_*.md")
    return file.read_text()


def parity_of(gpu: ModuleType, folder: Path, change) -> tuple[int, dict]:
    """Exit code, and rows by case, if the copy on the device is changed; only for three heads."""
    copied, heads = gpu.gpu_parity.copied, gpu.gpu_parity.HEADS

    def changed(network, *device):
        copy = copied(network, *device)
        with torch.no_grad():
            change(copy)
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.gpu_parity, "copied", changed)
        patch.setattr(gpu.gpu_parity, "HEADS", {name: heads[name] for name in FEW_HEADS})
        code = gpu.main(["--toy", "--only", "parity", "--output", str(folder)])
    return code, {row["case"]: row for row in result_in(folder)["tables"]["Differences from the CPU"]}


def test_all_tables(gpu, tmp_path, capsys):
    assert gpu.main(["--toy", "--output", str(tmp_path)]) == 0
    result, text = result_in(tmp_path), table_in(tmp_path)
    assert result["problems"] == [] and "Nothing failed." in text and text in capsys.readouterr().out
    assert result["machine"]["torch"] == torch.__version__ and result["machine"]["sizes"].startswith("toys")
    parity, losses, training, writing = result["tables"].values()
    heads = list(gpu.gpu_parity.HEADS)
    assert [row["case"] for row in parity] == [*heads, "autoencoder", *(f"{head}, text" for head in heads)]
    for row in parity[: len(heads) + 1]:
        for kind, bound in gpu.gpu_parity.BOUNDS["float32"].items():
            assert row[f"{kind}, float32"] <= (bound if torch.cuda.is_available() else 0)
            assert 0 < row[f"{kind}, bf16"] < 0.1
    assert all(row["texts alike"] == "4 of 4" for row in parity[len(heads) + 1 :])
    assert [row["way"] for row in losses] == ["literal", "ours", "integrated"] * 2
    for row in training:
        if "flash" in row["case"] and "note" in row:
            assert row["note"].endswith("is not installed")
        else:
            assert row["least"] <= row["tokens/s"] <= row["most"] and row["batch"] == "2 x 64"
            assert 0 < row["utilisation"] < 1 and row["memory, GiB"] > 0
    assert len(training) == 6 and sum("compiled" in row["case"] for row in training) == 4
    ways = ["baseline", "CALM", "baseline, compiled", "CALM, compiled"]
    cases = [(row["case"], row["T"], row["way"]) for row in writing]
    assert cases == [(f"batch {b}", t, way) for b in (1, 64, 8) for t in (1, 0.5) for way in ways]
    assert all(row["tokens/s"] > 0 for row in writing)


def test_a_wrong_weight_is_found(gpu, tmp_path):
    def change(copy):
        _trained(copy).flatten()[5::3] += 1

    code, rows = parity_of(gpu, tmp_path, change)
    assert code == 1
    for name in (*FEW_HEADS, "autoencoder"):
        for kind in ("states", "gradients"):
            assert f"{kind} in float32 differ by" in rows[name]["problem"]
    assert table_in(tmp_path).count("FAILED: ") == len(FEW_HEADS) * 2 + 1


def test_a_wrong_decoder_is_found(gpu, tmp_path):
    """By its texts only: neither losses nor gradients depend on it."""

    def change(copy):
        if isinstance(decoder := getattr(getattr(copy, "autoencoder", None), "decoder", None), nn.Module):
            for weight in decoder.parameters():
                weight.mul_(-1)

    code, rows = parity_of(gpu, tmp_path, change)
    assert code == 1 and rows["energy"]["problem"] == ""
    assert (
        rows["energy, text"]["problem"] == "4 texts differ"
        and rows["energy, text"]["texts alike"] == "0 of 4"
    )


def test_nan_is_found(gpu, tmp_path):
    code, rows = parity_of(gpu, tmp_path, lambda copy: _trained(copy).fill_(torch.nan))
    assert code == 1 and all(row["problem"] for row in rows.values())
    assert rows["flow"]["loss, float32"] == "NaN" and "not finite" in rows["flow, text"]["problem"]


def _trained(network: nn.Module) -> torch.Tensor:
    return next(weight for weight in network.parameters() if weight.requires_grad)


def test_differences_are_relative_to_the_reference(gpu):
    difference = gpu.gpu_parity.difference
    assert difference(torch.zeros(2), torch.zeros(2)) == 0
    assert difference(torch.zeros(2), torch.ones(2)) == float("inf")
    assert difference(torch.tensor([4.0, 1.0]), torch.tensor([4.0, 2.0])) == 0.25


def test_a_case_that_fails_is_named_and_the_others_still_run(gpu, tmp_path, monkeypatch):
    def fail(*sizes):
        raise ValueError("no room | here\nfor these")

    monkeypatch.setattr(gpu.gpu_speed.energy, "step", fail)
    assert gpu.main(["--toy", "--only", "energy", "--output", str(tmp_path)]) == 1
    assert "| ValueError" not in table_in(tmp_path) and "FAILED: ValueError: no room / here |" in table_in(
        tmp_path
    )
    failed, *others = result_in(tmp_path)["tables"]["The energy loss in float32"]
    assert failed["problem"] == "ValueError: no room | here" and others[0]["way"] == "literal"


def test_a_section_whose_cases_cannot_be_built_is_named(gpu):
    def fail():
        raise OSError("a recipe is gone")

    assert gpu.run(gpu.Section("A title", 1, fail), 0) == [
        {"case": "A title", "problem": "OSError: a recipe is gone"}
    ]


def test_cases_that_do_not_fit_in_the_time_are_left_out(gpu, monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now.seconds)
    deadlines = []

    def take(seconds, until):
        deadlines.append(until)
        now.seconds += seconds
        return [{"ms": seconds}]

    cases = {
        "a": partial(take, 3.0),
        "b": partial(take, 4.0),
        "c": partial(take, 1.0),
        "d": partial(take, 1.0),
    }
    rows = gpu.run(gpu.Section("A title", 1, lambda: cases), until=10.0)
    left_out = {"note": "left out: no time was left"}
    assert rows == [
        {"case": "a", "ms": 3},
        {"case": "b", "ms": 4},
        *({"case": name, **left_out} for name in "cd"),
    ]
    assert deadlines == [2.5, 3 + 7 / 3]


def test_rounds_end_when_the_time_is_up(gpu):
    calls = []
    times = sys.modules["measure"].in_turns({"": lambda: calls.append(1)}, rounds=5, warm_up=2, until=0)
    assert len(times[""]) == 1 and len(calls) == 3
    assert gpu.gpu_speed._rounds(times[""], 5) == {"note": "shortened: 1 of 5 rounds"}


def test_a_batch_that_is_too_large_is_halved(gpu, monkeypatch):
    def steps(recipe, config, blocks, *others):
        if blocks > 1:
            raise torch.OutOfMemoryError("no room")
        return [0.5], 2**30

    monkeypatch.setattr(gpu.gpu_speed, "_steps", steps)
    (row,) = gpu.gpu_speed.training_cases("", True, rounds=1)["calm_m, sdpa"](0)
    assert (row["batch"], row["tokens/s"], row["memory, GiB"]) == ("1 x 64", 128, 1)


def test_peak_rate_is_from_the_data_sheet_or_measured(gpu):
    assert gpu.gpu_speed.bf16_peak("NVIDIA H100 80GB HBM3") == (989.4e12, "data sheet")
    assert gpu.gpu_speed.bf16_peak("NVIDIA A100-SXM4-80GB MIG 1g.10gb")[1].startswith("measured")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "torch finds no GPU here (torch.cuda.is_available() is false); --toy runs without one."),
        (["--toy", "--output", "{folder}/file/tables"], "file/tables: Not a directory."),
        (["--toy", "--minutes", "0"], "argument --minutes: must be a number above 0, got '0'"),
        (["--toy", "--minutes", "soon"], "argument --minutes: must be a number above 0, got 'soon'"),
    ],
)
def test_mistakes_are_one_sentence(gpu, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    try:
        code = gpu.main([argument.format(folder=tmp_path) for argument in arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2 and capsys.readouterr().err.splitlines()[-1].endswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
