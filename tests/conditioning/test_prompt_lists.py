"""Lists of prompts: the formats of their files, and lists too long for memory."""

import copy
import json
import pickle
import sys
from types import ModuleType, SimpleNamespace

import pytest

from flowdistill.conditioning import prompt_lists
from flowdistill.conditioning.prompt_lists import Numbers, Texts, read_prompts
from flowdistill.utils.errors import UserError

TEXTS = ["a red cat", "", "two, \"birds\"", "das Meer\nbei Nacht", "\u2028ἅλς 🐚", "a red cat"]


@pytest.mark.parametrize("most", [0, 1 << 20], ids=["in a file", "in memory"])
def test_texts_are_a_list(monkeypatch, most):
    monkeypatch.setattr(prompt_lists, "IN_MEMORY", most)
    texts = Texts(iter(TEXTS))
    assert (texts._bytes is None) == (most == 0)
    assert texts == TEXTS and TEXTS == texts and texts != TEXTS[:-1] and texts != [*TEXTS[:-1], "x"]
    assert len(texts) == 6 and texts[-1] == "a red cat" and texts[4] == TEXTS[4] and list(texts) == TEXTS
    for part in (slice(1, 4), slice(None), slice(4, 2), slice(None, None, -2), slice(5, 99)):
        assert texts[part] == TEXTS[part]
    with pytest.raises(IndexError):
        texts[6]
    assert pickle.loads(pickle.dumps(texts)) == texts and copy.deepcopy(texts) is texts


def test_digests_tell_texts_and_their_bounds_apart():
    texts = Texts(["ab", "c", "ab", "c", "a", "bc"])
    assert texts.digest(0, 2) == texts.digest(2, 4) != texts.digest(4, 6)
    assert texts.digest() == Texts(list(texts)).digest() != texts.digest(0, 5)


def test_numbers_are_a_list():
    assert Numbers([0.25, 0.75]) == [0.25, 0.75] != Numbers([0.25, 0.5])
    assert Numbers([0.25, 0.75])[1] == 0.75 and Numbers([0.25, 0.75])[:1] == [0.25]


class Table:
    """What is used of pyarrow's reader, over rows that a test has written as JSON."""

    def __init__(self, file):
        self.rows = json.loads(file.read_text())
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        self.schema_arrow = SimpleNamespace(names=names)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def iter_batches(self, size, columns):
        assert set(columns) <= set(self.schema_arrow.names)
        for row in self.rows:
            yield SimpleNamespace(to_pydict=lambda row=row: {name: [row.get(name)] for name in columns})


@pytest.fixture
def pyarrow(monkeypatch):
    arrow, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    arrow.ArrowException, arrow.parquet, parquet.ParquetFile = RuntimeError, parquet, Table
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)


WRITTEN = {
    "p.txt": "a cat\r\n\r\n a dog \na cat, a dog",
    "p.list": "a cat\na dog\na cat, a dog\n",
    "p.jsonl": '{"text": "a cat", "weight": 2}\n\n{"text": "a dog", "weight": "1"}\n{"text": "a cat, a dog"}',
    "p.csv": '\ufefftext,size,weight\r\na cat,1,2\n\na dog,2,1\n"a cat, a dog",3,1e0\n',
    "P.CSV": 'weight,text\n2,a cat\n1,a dog\n1,"a cat, a dog"',
    "p.parquet": '[{"text": "a cat", "weight": 2}, {"text": "a dog", "weight": 1}, '
                 '{"text": "a cat, a dog", "weight": 1}]',
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_format(tmp_path, pyarrow, name):
    (tmp_path / name).write_text(WRITTEN[name], newline="")
    column = None if name in ("p.txt", "p.list") else "text"
    weights = [1 / 3] * 3 if column is None else [0.5, 0.25, 0.25]
    assert read_prompts(tmp_path / name, column) == (["a cat", "a dog", "a cat, a dog"], weights)
    if column is not None:
        (tmp_path / name).write_text(WRITTEN[name].replace("text", "prompt"), newline="")
        assert read_prompts(tmp_path / name).prompts == ["a cat", "a dog", "a cat, a dog"]


@pytest.mark.parametrize(
    "name, content, column, message",
    [
        ("p.txt", "a", "text", "teacher.prompt_column is .text., but .* .*p.txt has lines and no columns"),
        ("p.txt", "\n \n", None, "has no prompt$"),
        ("p.txt", b"a\nb\xff", None, "is not text in UTF-8: line 2 has the byte 0xff"),
        ("p.txt", "a\n\0", None, "zero bytes"),
        ("p.jsonl", '{"text": "a"}', None, 'line 1 of .*p.jsonl must be like {"prompt": "a cat"'),
        ("p.jsonl", '{"text": "a", "weight": NaN}', "text", 'must be like {"text": "a cat"'),
        ("p.csv", "", None, "is empty; it begins with the names of its columns, 'prompt' among"),
        ("p.csv", "text,weight\na,1", None, "no column .prompt., but the columns text, weight; .*prompt_column"),
        ("p.csv", "prompt,size\na cat, black,2", None, "line 2 of .* has 3 columns, and its first line has 2.*quotes"),
        ("p.csv", 'prompt\n"a cat', None, "line 2 of .*p.csv is no CSV"),
        ("p.csv", "prompt,weight\na,1\nb,-1", None, "line 3 of .* has the weight '-1'; it must be a number"),
        ("p.csv", "prompt,weight\na,0", None, "has no prompt with a weight above 0"),
        ("p.parquet", '[{"prompt": "a"}, {"prompt": null}]', None, "row 2 of .* has None in 'prompt'; it must have a"),
        ("p.parquet", '[{"prompt": "a", "weight": -1}]', None, "row 1 of .* and -1 in 'weight'"),
        ("p.parquet", '[{"text": "a"}]', None, "has no column 'prompt', but the columns text"),
        ("none.csv", None, None, "the prompts file .*none.csv does not exist"),
        ("none.parquet", None, None, "the prompts file .*none.parquet does not exist"),
    ],
)
def test_bad_files(tmp_path, pyarrow, name, content, column, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name, column)


def test_a_table_without_its_reader(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pyarrow reads, which is not installed; install flowdistill\[parquet\]"):
        read_prompts(tmp_path / "p.parquet")
