"""Tables that cannot be read, and cells that can."""

import pytest

from simllm.errors import InputError
from simllm.validation.table import Row, read_table

NEEDED = ("gpu", "layers")


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"gpu,layers\n", "has a header but no rows"),
        (b"gpu,layers\n , \n", "has a header but no rows"),
        (b"gpu,tp\nh100-sxm,1\n", "lacks the column layers; needed are gpu, layers"),
        (b"a,b\n1,2\n", "lacks the columns gpu, layers"),
        (b"gpu,layers,gpu\na,1,b\n", "more than one column named gpu"),
        (b"gpu,layers\n\xff\xfe\x00,1\n", "is not a CSV file in UTF-8"),
        (b"PK\x03\x04\x14\x00\x06\x00\x80\x81", "is not a CSV file in UTF-8"),
        (b'gpu,layers\n"' + b"x" * 200_000 + b'",1\n', "is not a CSV file in UTF-8"),
    ],
)
def test_files_that_are_no_table(tmp_path, content, says):
    path = tmp_path / "runs.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_table(path, NEEDED)


def test_not_a_file(tmp_path):
    with pytest.raises(InputError, match="is not a file"):
        read_table(tmp_path, NEEDED)
    with pytest.raises(InputError, match="does not exist"):
        read_table(tmp_path / "nothing.csv", NEEDED)


def test_a_byte_order_mark_blanks_and_empty_lines_do_no_harm(tmp_path):
    path = write(tmp_path / "runs.csv", " gpu ,layers\n\n h100-sxm , 32 \n", "utf-8-sig")
    [row] = read_table(path, NEEDED)
    assert row.text("gpu") == "h100-sxm"
    assert row.integer("layers") == 32
    assert row.line == 3


def test_a_line_with_more_cells_than_columns_is_kept_and_named(tmp_path):
    rows = read_table(write(tmp_path / "runs.csv", "gpu,layers\na,1,x\nb\nc,3,,\n"), NEEDED)
    assert [row.problem for row in rows] == ["line 2 has 3 cells for 2 columns", "", ""]
    assert rows[1].text("layers") == ""


@pytest.mark.parametrize(
    ("cell", "method", "says"),
    [
        ("eight", "integer", "tp='eight' is not a whole number"),
        ("4.5", "integer", "tp='4.5' is not a whole number"),
        ("nan", "integer", "is not a whole number"),
        ("inf", "integer", "is not a whole number"),
        ("0", "integer", "must be from 1 to"),
        ("-8", "integer", "must be from 1 to"),
        ("1e300", "integer", "must be from 1 to"),
        ("80 GB", "number", "tp='80 GB' is not a number"),
        ("nan", "number", "above zero and finite"),
        ("-1", "number", "above zero and finite"),
        ("maybe", "flag", "must be 1 or 0"),
        ("2", "flag", "must be 1 or 0"),
    ],
)
def test_cells_that_are_no_numbers(cell, method, says):
    with pytest.raises(InputError, match=says):
        getattr(Row(line=2, cells={"tp": cell}), method)("tp")


@pytest.mark.parametrize(("cell", "value"), [("1", True), ("0.0", False), ("TRUE", True), ("no", False), ("", None)])
def test_flags(cell, value):
    assert Row(line=2, cells={"x": cell}).flag("x") is value


def test_numbers_as_tables_write_them():
    row = Row(line=2, cells={"a": "4.0", "b": " 1e3 ", "c": ""})
    assert row.integer("a") == 4
    assert row.integer("b") == 1000
    assert row.number("b") == 1000.0
    assert row.integer("c") is None
    with pytest.raises(InputError, match="c is not stated"):
        row.needed_integer("c")


def test_an_assumption_is_stated_once():
    row = Row(line=2, cells={})
    row.assume("one")
    row.assume("two")
    row.assume("one")
    assert row.assumptions == ["one", "two"]
