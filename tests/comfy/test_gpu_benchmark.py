"""benchmarks/gpu.py, proven before there is a GPU: a dry run with small models, its processes, figures and folder."""

import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import comfy.cli_args
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
COMMAND = REPOSITORY / "benchmarks" / "gpu.py"
# each function that parts have
DRY_RUN = ("right_normal", "right_lowvram", "right_goldens", "right_precision", "right_compiled", "right_memory",
           "right_resumed", "right_out_of_memory", "fast_sd15", "fast_flux", "kept_sdxl", "training_wan")
OF_TIME = ("control's own time", "whole step above")  # figures whose goals small models on a CPU do not reach


@pytest.fixture(scope="module")
def gpu():
    """The command's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", [*sys.path, str(COMMAND.parent)])
        yield importlib.import_module("gpu")


@pytest.fixture
def figures(gpu):
    return sys.modules["on_gpu.figures"]


@pytest.fixture
def work(figures, tmp_path):
    return figures.Work("part", True, None, tmp_path)


def by_python(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(lines)]


def test_a_dry_run_finds_every_kind_of_figure_and_all_that_is_not_about_time_holds(tmp_path):
    (tmp_path / "pytest.py").write_text("raise ModuleNotFoundError('a machine that is there for its GPU has none')")
    environment = {**os.environ, "COMFYUI_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, COMMAND, *DRY_RUN, "--small", "--minutes", "60", "--out", tmp_path]
    said = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    states = {line["part"]: (line["state"], line.get("error")) for line in lines if "state" in line}
    assert states == dict.fromkeys(DRY_RUN, ("done", None)), said.stderr
    assert {line["part"] for line in lines if "figure" in line} == set(DRY_RUN)

    failed = [line for line in lines if line.get("holds") is False]
    assert [line for line in failed if not any(what in line["figure"] for what in OF_TIME)] == []
    rows = said.stdout.splitlines()
    assert [row.split()[0] for row in rows[rows.index("") + 2:-2]] == list(states)
    assert len(said.stdout) < 300 * len(DRY_RUN), "the table is not short"


def test_every_function_has_a_part_in_the_dry_run(gpu):
    functions = {part.function for part in gpu.PARTS if part.name in DRY_RUN}
    assert functions == {part.function for part in gpu.PARTS}
    assert len({part.name for part in gpu.PARTS}) == len(gpu.PARTS)


def test_comfyui_knows_the_options_of_every_part(gpu):
    for part in gpu.PARTS:
        comfy.cli_args.parser.parse_args(["--use-pytorch-cross-attention", *part.options])


@pytest.mark.parametrize("code, expected", [
    (["pass"], ["done"]), (["import sys", "sys.exit(3)"], ["failed"]),
    (["import os", "print('last words', flush=True)", "os._exit(7)"], ["died with 7", "last words\n"]),
    (["import os, signal", "os.kill(os.getpid(), signal.SIGKILL)"], ["died with -9", ""])], ids=str)
def test_a_part_that_dies_takes_nothing_down_and_says_how(gpu, code, expected):
    assert gpu.ended_in(by_python(*code), 30, {}) == expected


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(gpu, tmp_path):
    started = tmp_path / "started"
    child = f"import time; open({str(started)!r}, 'a').close(); time.sleep(60)"
    state, said = gpu.ended_in(by_python("import subprocess, sys, time", "print('so far', flush=True)",
                                         f"print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)",
                                         "time.sleep(60)"), 3, {})
    assert state == "ended after 3 s"
    assert started.exists()
    first, pid = said.split("\n")[:2]
    assert first == "so far"
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "a process that the part started is still there"
        time.sleep(0.1)


def test_a_part_has_its_own_variables(gpu):
    code = ["import os, sys", "sys.exit(0 if os.environ['CUDA_LAUNCH_BLOCKING'] == '1' else 3)"]
    assert gpu.ended_in(by_python(*code), 30, {"CUDA_LAUNCH_BLOCKING": "1"}) == ["done"]


def test_no_part_is_started_for_less_than_it_needs_at_least(gpu, tmp_path):
    assert gpu.run_part(gpu.PARTS[0], Path(sys.executable), tmp_path, time.monotonic() + 5) == "no time left"


def test_parts_are_chosen_by_name_by_beginning_or_by_what_is_left(gpu):
    def names(*asked: str, lines=()) -> list[str]:
        return [part.name for part in gpu.chosen(list(asked), list(lines), False)]

    every = [part.name for part in gpu.PARTS]
    assert names("fast_sd15") == ["fast_sd15"]
    assert names("fast_sd1") == ["fast_sd15", "fast_sd15_compiled"]
    assert names("kept", "right_goldens") == ["right_goldens", "kept_sdxl", "kept_sd15"]
    lines = [{"part": "kept_sdxl", "state": "done", "small": False}, {"part": "kept_sd15", "state": "failed"},
             {"part": "fast_wan", "state": "done", "small": True}]
    assert names(lines=lines) == [name for name in every if name != "kept_sdxl"]
    assert names("kept_sdxl", lines=lines) == ["kept_sdxl"]
    with pytest.raises(SystemExit, match="PART: none is or begins with slow"):
        names("slow")


def test_what_is_timed_runs_alone_and_what_others_are_compared_with_runs_first(gpu):
    groups = [[part.name for part in group] for group in gpu.together(list(gpu.PARTS))]
    assert [name for group in groups for name in group] == [part.name for part in gpu.PARTS]
    assert groups[0] == ["right_normal"]
    assert [group for group in groups if len(group) > 1] == [groups[1]]
    assert all(name.startswith("right_") for name in groups[1])


def test_figures_say_whether_goals_hold_and_the_table_has_a_parts_last_run(work, figures, tmp_path):
    work.note("before", 1.0)
    figures.write_line(tmp_path, {"part": "part", "state": "failed"})
    work.note("share", 0.02, "%", most=0.015)
    work.note("time", 0.5, "ms", brief="half")
    work.note("right", True, wanted=True)
    work.note("nothing", float("nan"), most=1.0)
    figures.write_line(tmp_path, {"part": "other", "state": "ended after 3 s"})
    with open(tmp_path / figures.FILE, "a") as file:
        file.write('{"part": "part", "fig')  # a process was ended while it wrote
    assert figures.rows_of(figures.read_lines(tmp_path)) == [
        ["part", "share", "2.00%", "<= 1.50%", "NO"], ["part", "time", "500.00 ms", "", ""],
        ["part", "right", "yes", "yes", "yes"], ["part", "nothing", "nan", "<= 1", "NO"],
        ["other", "", "ended after 3 s", "", "NO"]]
    assert [row.split() for row in figures.short_table(figures.read_lines(tmp_path)).splitlines()[1:]] == [
        "part not ended 1 of 3 half 500.00 ms, MISSED: share 2.00%, MISSED: nothing nan".split(),
        "other ended after 3 s 0 of 0".split()]


def test_a_picture_is_compared_with_the_first_ones(work):
    import torch
    apart = [work.beside_others("one", lambda value=value: torch.tensor(value), lambda new, first: float(new - first))
             for value in (1.0, 3.0, 1.0)]
    assert apart == [None, 2.0, 0.0]


def test_a_profile_is_summed_up(gpu):
    device = importlib.import_module("on_gpu.device")

    def event(cat: str, name: str, ts: float, dur: float, **args) -> dict:
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    found = device.summary([
        event("kernel", "gemm", 20.0, 10.0), event("kernel", "gemm", 0.0, 10.0), event("kernel", "add", 11.0, 4.0),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 22.0, 5.0, bytes=100),
        event("cuda_runtime", "cudaStreamSynchronize", 12.0, 3.0), event("cuda_runtime", "cudaLaunchKernel", 1.0, 1.0),
        {"name": "process_name", "ph": "M"}])
    assert found["span"] == 30.0 and found["busy"] == 24.0
    assert found["kernels"] == {"gemm": [2, 20.0], "add": [1, 4.0]}
    assert found["copies"] == {"Memcpy HtoD (Pinned -> Device)": [1, 5.0, 100]}
    assert found["gaps"] == {"number": 1, "time": 5.0, "after": {"add": 5.0}}
    assert found["waits"] == {"cudaStreamSynchronize": [1, 3.0]}


def test_a_packed_folder_gives_comfyui_and_packages(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("CONTROLNEXT_CACHE", str(tmp_path / "cache"))
    tree, folder = tmp_path / "tree", tmp_path / "packed"
    for name in ("main.py", "comfy/ops.py", "tests/test_it.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    (folder / gpu.pack.WHEELS).mkdir(parents=True)
    with zipfile.ZipFile(folder / gpu.pack.WHEELS / "one-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("one/__init__.py", "")
    gpu.pack.compress(tree, folder / gpu.pack.COMFYUI)
    for _ in range(2):
        variables = gpu.pack.unpacked(folder)
        comfyui = Path(variables["COMFYUI_PATH"])
        assert sorted(str(file.relative_to(comfyui)) for file in comfyui.rglob("*.py")) == ["comfy/ops.py", "main.py"]
        assert (Path(variables["PYTHONPATH"]) / "one" / "__init__.py").is_file()
        assert variables["COMFYUI_PYTHON"] == sys.executable
    with pytest.raises(gpu.environment.SetupError, match="holds no comfyui.tar.xz"):
        gpu.pack.unpacked(tmp_path)


def test_what_travels_has_no_weights(gpu):
    names = gpu.pack.travelling()
    assert "benchmarks/gpu.py" in names and "tests/goldens/unet.safetensors" in names
    assert not [name for name in names if name.startswith("demo_model/weights")]
