"""The command `foveate data`, run as a user runs it."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate import cli
from foveate.vlm.processor import FoveateProcessor

COMMANDS = {
    "make": ["SOURCE", "OUT", "--kind", "--documents-per-shard", "--megabytes-per-shard", "--workers", "--media-root"],
    "index": ["DIR"],
    "verify": ["DIR"],
    "inspect": ["SOURCE", "OUT.html", "--processor", "--count", "--seed", "--format", "--subset", "--frames"],
    "stats": ["SOURCE", "--processor", "--sample", "--out", "--json", "--workers"],
}


@dataclass
class Ran:
    """An exit code and what was printed."""

    code: int
    out: str
    err: str

    def assert_user_error(self, *said: str) -> None:
        assert self.code == 2, self.err
        assert self.err.count("\n") == 1 and "Traceback" not in self.err, self.err
        for words in said:
            assert words in self.err


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `foveate data …` in this process."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["foveate", "data", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ran(ended.value.code, *capfd.readouterr())  # type: ignore[arg-type]

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="jpeg")
        (folder / f"{number}.jpg").write_bytes(buffer.getvalue())
        (folder / f"{number}.txt").write_text("a red circle ; a blue 3")
    return folder


@pytest.fixture
def model(processor: FoveateProcessor, tmp_path: Path) -> Path:
    """A model's folder, of which only the processor is read."""
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_names_its_arguments(data: Callable[..., Ran], command: str) -> None:
    ran = data(command, "--help")
    assert ran.code == 0
    assert all(word.upper() in ran.out.upper() for word in COMMANDS[command])


def test_help_is_quick() -> None:
    """Nothing heavy is imported for it."""
    code = (
        "import sys\n"
        "from foveate import cli\n"
        "sys.argv = ['foveate', 'data', '--help']\n"
        "try:\n    cli.main()\n"
        "except SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'webdataset', 'PIL'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "inspect" in ran.stdout and ran.stdout.splitlines()[-1] == "[]"


def test_shards_are_made_verified_and_read(data: Callable[..., Ran], folder: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    ran = data("make", folder, out, "--documents-per-shard", 2, "--workers", 1)
    assert (ran.code, ran.err) == (0, "")
    total = sum(tar.stat().st_size for tar in out.glob("*.tar"))
    assert ran.out == f"5 documents, 5 images, {total / 1000:.1f} kB in 3 shards in {out}\n"
    assert "(3 were there)" in data("make", folder, out, "--documents-per-shard", 2, "--verify").out
    ran = data("verify", out)
    assert (ran.code, ran.out) == (0, "3 of 3 shards are as index.json says\n")
    ran = data("stats", out, "--processor", model, "--json", "--workers", 1)
    assert ran.code == 0
    assert json.loads(ran.out)["measures"]["images"]["total"] == 5
    ran = data("stats", out, "--processor", "glyphs", "--sample", 3, "--out", tmp_path / "stats", "--workers", 1)
    assert ran.code == 0 and "3 of 5 documents read (evenly spread" in ran.out
    assert json.loads((tmp_path / "stats" / "statistics.json").read_text())["read"] == 3
    assert (tmp_path / "stats" / "statistics.png").exists()
    ran = data("inspect", out, tmp_path / "new" / "page.html", "--processor", model, "--count", 2)
    assert ran.code == 0
    page = (tmp_path / "new" / "page.html").read_text()
    assert page.count("<article") == 2 and "⟨image: 16 tokens⟩" in page


def test_embedded_data_need_no_processor(data: Callable[..., Ran], tmp_path: Path) -> None:
    assert data("inspect", "glyphs:clip_chat", tmp_path / "page.html", "--count", 2).code == 0
    assert "frames a document" in data("stats", "glyphs:clip_chat?documents=9", "--workers", 1).out


def test_damaged_shards_are_listed(data: Callable[..., Ran], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    data("make", folder, out, "--documents-per-shard", 1, "--workers", 1)
    for number, damage in ((1, lambda b: b[:-1]), (3, lambda b: b[:600] + bytes([b[600] ^ 1]) + b[601:])):
        tar = out / f"shard-{number:06d}.tar"
        tar.write_bytes(damage(tar.read_bytes()))
    (out / "shard-000004.tar").unlink()
    ran = data("verify", out)
    assert ran.code == 1
    named = [line.split(":")[0] for line in ran.out.splitlines()]
    assert named == [*(f"shard-{n:06d}.tar" for n in (1, 3, 4)), "2 of 5 shards are as index.json says"]


def test_foreign_shards_are_indexed(data: Callable[..., Ran], folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "foreign"
    shards.mkdir()
    names = [path.name for path in sorted(folder.iterdir())]
    subprocess.run(["tar", "-cf", str(shards / "x.tar"), "-C", str(folder), *names], check=True)
    ran = data("index", shards)
    assert (ran.code, ran.out) == (0, f"5 documents in 1 shards; index in {shards / 'index.json'}\n")
    assert (shards / "x.tar.idx").exists()
    assert data("verify", shards).code == 0
    assert json.loads(data("stats", shards, "--processor", "glyphs", "--json").out)["measures"]["images"]["total"] == 5


def test_refused_documents_are_told(data: Callable[..., Ran], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    (folder / "2.jpg").write_bytes(b"<html>")
    ran = data("make", folder, out, "--workers", 1)
    ran.assert_user_error("1 of 5 documents", "1 unreadable_media", "2: unreadable_media", str(out / "refused.jsonl"))
    ran = data("make", folder, out, "--workers", 1, "--max-bad-fraction", 0.2)
    assert ran.code == 0
    assert ran.out.splitlines()[1] == f"refused: 1 unreadable_media; listed in {out / 'refused.jsonl'}"


def test_ctrl_c_says_that_the_command_goes_on(
    data: Callable[..., Ran], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "shards"

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    data("make", folder, out, "--documents-per-shard", 2, "--workers", 1)
    (out / "shard-000001.tar.json").unlink()
    monkeypatch.setattr("foveate.data.writing._write_shard", interrupted)
    ran = data("make", folder, out, "--documents-per-shard", 2, "--workers", 1)
    assert (ran.code, ran.out) == (130, "")
    assert ran.err == f"2 shards in {out} are whole; the same command goes on with the others\nstopped\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["make", "nothing", "out"], "nothing: not there"),
        (["make", "pictures", "pictures/out"], "lies inside"),
        (["make", "pictures", "."], "which is not of this command"),
        (["make", "glyphs:captions?documents=2", "out", "--documents-per-shard", "1", "--megabytes-per-shard", "1"],
         "accepted: one of them"),
        (["make", "pictures", "out", "--kind", "poems"], "'folder'"),
        (["make", "pictures", "out", "--max-bad-fraction", "2"], "--max-bad-fraction"),
        (["make", "pictures", "out", "--media-root", "nothing"], "media_root is"),
        (["index", "pictures"], "no shards"),
        (["index", "nothing"], "'nothing' does not exist"),
        (["verify", "pictures"], "index.json"),
        (["inspect", "pictures", "page.html"], "--processor is not given"),
        (["inspect", "pictures", "page.html", "--processor", "./nothing"], "./nothing: no such folder"),
        (["inspect", "pictures", "page.html", "--processor", "glyphs"], "neither shards nor a dataset"),
        (["inspect", "glyphs:poems", "page.html"], "accepted: regions"),
        (["inspect", "glyphs:captions", "page.html", "--subset", "s.json"], "subset given; accepted: none"),
        (["inspect", "https://x.org/a.tar", "page.html", "--processor", "glyphs"], "nothing is downloaded"),
        (["stats", "glyphs:captions"], "endless; accepted: a sample"),
        (["stats", "glyphs:captions", "--sample", "0"], "--sample"),
    ],
)  # fmt: skip
def test_users_errors_are_one_line_and_exit_code_2(
    data: Callable[..., Ran],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    data(*arguments).assert_user_error(said)
    assert {path.name for path in tmp_path.iterdir()} <= {"pictures", "out"}
    assert len(list(folder.iterdir())) == 10
