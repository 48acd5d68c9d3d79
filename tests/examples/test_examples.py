from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import tabular


def test_both_examples_learn_the_pima_file_and_agree_to_the_bit(tmp_path: Path, pima: Path) -> None:
    from resumable_trainer.metrics.history import History
    from resumable_trainer.snapshot.store import Store

    ended = []
    for name in ("own_loop", "ready_made"):
        line = [sys.executable, str(EXAMPLES / f"{name}.py"), "--data", str(pima), "--epochs", "32", "--run-dir", name]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)
        assert done.returncode == 0, done.stderr
        run = tmp_path / name
        assert max(History.read(run / "metrics.jsonl").epochs("test_accuracy")) >= 0.70
        assert (run / "history.png").is_file()
        newest = Store(run).path(Store(run).names()[-1])
        files = [run / "metrics.jsonl", newest / "model.safetensors", newest / "optimizer.safetensors"]
        ended.append([path.read_bytes() for path in files])
    assert ended[0] == ended[1]


GOOD = "1,2,0\n3,4,1\n5,6,0\n7,8,1\n"


@pytest.mark.parametrize(
    ("text", "tests", "message"),
    [
        ("1,2,0\n3,x,1\n", None, r"line 2 column 2: 'x' is not a finite number"),
        ("a,b,c\n1,2,0\n3,nan,1\n", None, r"line 3 column 2: 'nan' is not a finite number"),
        ("1,2,0\n3,4\n", None, r"line 2 has 2 columns, the lines before have 3"),
        ("", None, r"line 1: the file holds no rows"),
        ("a,b,c\n", None, r"line 1: the file holds no rows"),
        ("1,2,0\n3,4,0\n5,6,0\n", None, r"column 3 \(the label\) has 1 classes \(0\), needed are 2"),
        ("1,2,0\n3,4,1\n5,6,2\n", None, r"column 3 \(the label\) has 3 classes"),
        (GOOD, 4, r"4 test rows asked, there are 4 rows"),
        ("1,2,0\n3,4,0\n5,6,1\n", 1, r"lines 1 to 2 \(train\) column 3: one class only"),
    ],
)
def test_a_bad_table_is_named_with_file_line_and_column(
    tmp_path: Path, text: str, tests: int | None, message: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(tabular.TableError, match=message) as error:
        tabular.split(tabular.read_csv(path), tests, str(path))
    assert str(path) in str(error.value)


def test_a_header_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(GOOD)
    (tmp_path / "b.csv").write_text("x,y,label\n" + GOOD)
    assert tabular.read_csv(tmp_path / "a.csv") == tabular.read_csv(tmp_path / "b.csv")


def test_without_scikit_learn_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(tabular.TableError, match=r"\[example\].*--data FILE.csv"):
        tabular.bundled_rows()
