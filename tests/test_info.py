"""`gptfast info`: the facts about the installation, the thread limits, and the warnings."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gptfast import ConfigError, info, threads
from gptfast.ops import select


def fake_extension(chosen: str | Exception = "avx2") -> SimpleNamespace:
    """A fake extension with two levels that can run and one that cannot."""

    def isa_current() -> str:
        if isinstance(chosen, Exception):
            raise chosen
        return chosen

    levels = {"generic": None, "avx2": None, "amx": "this machine has no AMX-TILE"}
    return SimpleNamespace(isa_levels=lambda: dict(levels), isa_current=isa_current)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder without a build record."""
    folder = tmp_path / "gptfast"
    folder.mkdir()
    monkeypatch.setattr(info, "_PACKAGE", folder)
    return folder


def record(package: Path, **facts: object) -> None:
    defaults = {"reason": None, "csrc": "", "torch": "2.10", "compiler": "c++ 12", "git": "abc"}
    (package / "_build_info.json").write_text(json.dumps({**defaults, "isa": {}, **facts}))


def use_extension(monkeypatch: pytest.MonkeyPatch, extension: object, error: str | None) -> None:
    monkeypatch.setattr(select, "extension", lambda: extension)
    monkeypatch.setattr(select, "extension_error", error)


def test_info_of_a_working_build(package, monkeypatch):
    record(package)
    use_extension(monkeypatch, fake_extension(), None)
    facts = info.info()
    assert facts["fused"] is None
    assert facts["isa"]["chosen"] == "avx2"
    assert facts["isa"]["levels"]["amx"] == "this machine has no AMX-TILE"
    assert facts["threads"]["usable"] <= facts["threads"]["torch"]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"reason": "installed with GPTFAST_BUILD_EXT=0"}, "GPTFAST_BUILD_EXT=0"),
        ({"reason": None}, "libtorch_cpu.so: cannot open"),
        (None, "neither `pip install` nor `make build`"),
    ],
)
def test_info_says_why_the_extension_is_missing(package, monkeypatch, facts, expected):
    if facts is not None:
        record(package, **facts)
    use_extension(monkeypatch, None, "libtorch_cpu.so: cannot open shared object file")
    found = info.info()
    assert expected in found["fused"]
    assert found["isa"] == {"chosen": None, "levels": {}}


def test_info_says_what_the_compiler_could_not_do(package, monkeypatch):
    record(package, isa={"generic": None, "amx": "unrecognized option '-mamx-tile'"})
    use_extension(monkeypatch, fake_extension(), None)
    reason = info.info()["isa"]["levels"]["amx"]
    assert reason == "left out of this build (unrecognized option '-mamx-tile')"


def test_info_survives_a_bad_isa_request(package, monkeypatch):
    record(package)
    use_extension(monkeypatch, fake_extension(ValueError("GPTFAST_CPU_ISA: no such level")), None)
    facts = info.info()
    assert facts["isa"]["chosen"] is None
    assert "GPTFAST_CPU_ISA: no such level" in facts["warnings"]


@pytest.mark.parametrize(
    ("found", "warning"),
    [
        ("2.10.0+cu128", None),
        ("2.13.1", None),
        ("2.9.1", "torch 2.9.1 is too old: gptfast needs 2.10 or a newer one"),
        ("2.15.0a0+git1", "torch 2.15.0a0+git1 is newer than those that gptfast is tested with "),
    ],
)
def test_info_names_both_versions_of_torch(package, monkeypatch, capsys, found, warning):
    record(package, torch="2.12.1")
    use_extension(monkeypatch, fake_extension(), None)
    monkeypatch.setattr(info.torch, "__version__", found)
    requirements = ["numpy", "torch<2.14,>=2.10", "torchvision<1.0; extra == 'none'"]
    monkeypatch.setattr(info.importlib.metadata, "requires", lambda name: requirements)
    about_torch = [text for text in info.info()["warnings"] if found in text]
    assert [text[: len(warning or "")] for text in about_torch] == ([warning] if warning else [])
    info.print_info()
    shown = " ".join(capsys.readouterr().out.split())
    assert f"torch {found} (tested: 2.10 to 2.13)" in shown
    assert "built with torch 2.12.1, c++ 12" in shown


@pytest.mark.parametrize(
    ("gpu", "triton", "reason", "shown"),
    [
        (False, None, "CUDA graphs need a GPU", "training graph CUDA graphs need a GPU"),
        (True, None, None, "training graph with --device cuda"),
        (True, "they need Triton", "the kernels cannot run: they need Triton", "need Triton"),
    ],
)
def test_info_says_whether_a_training_step_can_be_a_graph(
    package, monkeypatch, capsys, gpu, triton, reason, shown
):
    record(package)
    use_extension(monkeypatch, fake_extension(), None)
    monkeypatch.setattr(info.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(info.torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(select, "triton_error", lambda: triton)
    if gpu and triton is None:  # info asks Triton about a GPU that is not there
        launch = pytest.importorskip("gptfast.ops.triton.launch")
        monkeypatch.setattr(launch, "slow_launches", lambda: None)
    assert info.info()["training_graph"] == reason
    info.print_info()
    assert shown in " ".join(capsys.readouterr().out.split())


def test_info_without_an_installation_knows_no_range(package, monkeypatch):
    def requires(name: str) -> list[str]:
        raise info.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(info.importlib.metadata, "requires", requires)
    assert info.info()["torch_range"] is None


def test_stale_build(package):
    source = package.parent / "csrc" / "kernels" / "matmul" / "gemm.inl"
    source.parent.mkdir(parents=True)
    source.write_text("one")
    assert not info.stale_build()  # nothing was built that could be stale
    record(package, csrc="7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed")
    assert not info.stale_build()
    source.write_text("two")
    assert info.stale_build()
    record(package, reason="installed with GPTFAST_BUILD_EXT=0")
    assert not info.stale_build()


def test_damaged_record_is_no_record(package):
    (package / "_build_info.json").write_text("{")
    assert info.build_info() == {}


def test_print_info_shows_reasons_and_warnings(package, monkeypatch, capsys):
    (package.parent / "csrc").mkdir()
    record(package, csrc="of other sources", isa={"amx": "[-mamx-tile] is unknown"})
    use_extension(monkeypatch, fake_extension(), None)
    monkeypatch.setattr(threads, "limits", lambda: threads.ThreadLimits(8, 4, 2.5))
    info.print_info()
    shown = " ".join(capsys.readouterr().out.split())
    assert "instruction set avx2" in shown
    assert "[-mamx-tile] is unknown" in shown
    assert "threads 2 torch's pool 8 affinity mask 4 cgroup quota 2.5" in shown
    assert "warning: csrc has changed" in shown
    assert "warning: torch uses 8 threads where 2 can run at once" in shown


@pytest.mark.parametrize(
    ("torch_threads", "affinity", "quota", "usable"),
    [(8, 8, None, 8), (8, 2, None, 2), (8, 8, 2.9, 2), (8, 8, 0.5, 1), (1, 8, 4.0, 1)],
)
def test_usable_threads(torch_threads, affinity, quota, usable):
    assert threads.ThreadLimits(torch_threads, affinity, quota).usable == usable


@pytest.mark.parametrize(
    ("torch_threads", "affinity", "quota", "processes", "usable"),
    [(1, 8, None, 2, 4), (1, 8, 6.5, 4, 1), (1, 2, None, 8, 1), (3, 16, None, 2, 3)],
)
def test_processes_share_the_threads_of_a_machine(
    torch_threads, affinity, quota, processes, usable
):
    assert threads.ThreadLimits(torch_threads, affinity, quota, processes).usable == usable


def test_torchrun_tells_how_many_processes_share_a_machine(monkeypatch):
    for told, count in (("4", 4), ("", 1), ("none", 1), ("0", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
        assert threads.local_processes() == threads.limits().processes == count
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert threads.local_processes() == 1


def test_use_usable_threads_sets_only_what_differs(monkeypatch):
    asked = []
    monkeypatch.setattr(threads.torch, "set_num_threads", asked.append)
    monkeypatch.setattr(threads, "limits", lambda: threads.ThreadLimits(8, 8, 3.0))
    threads.use_usable_threads()
    monkeypatch.setattr(threads, "limits", lambda: threads.ThreadLimits(2, 8, 3.0))
    threads.use_usable_threads()
    monkeypatch.setattr(threads, "limits", lambda: threads.ThreadLimits(1, 8, None, processes=2))
    threads.use_usable_threads()
    assert asked == [3, 4]


def test_a_number_of_threads_is_one_that_the_system_starts(monkeypatch):
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 2)
    assert [threads.check_threads("--threads", n) for n in (1, np.int64(8), 256)] == [1, 8, 256]
    for wrong in (0, -1, 257, 100_000, 2**64, 1.5, True, "2"):
        with pytest.raises(ConfigError, match="^--threads must be a whole number from 1 to 256 on"):
            threads.check_threads("--threads", wrong)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 384)
    assert threads.check_threads("--threads", 1000) == 1000


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2.0),
        ("0::/a", {"cpu.max": "100000 100000", "a/cpu.max": "400000 100000"}, 1.0),
        ("0::/elsewhere", {}, None),
        (
            "4:cpu,cpuacct:/a\n3:memory:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "20000"},
            2.5,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_cgroup_quota(tmp_path, membership, files, quota):
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "cgroup").write_text(membership + "\n")
    assert threads.cgroup_quota(tmp_path / "root", tmp_path / "cgroup") == quota


def test_cgroup_quota_without_cgroups(tmp_path):
    assert threads.cgroup_quota(tmp_path, tmp_path / "absent") is None
