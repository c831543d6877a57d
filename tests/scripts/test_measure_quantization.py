"""The table of quantised teachers: its figures are those of the schemes."""

from scripts import measure_quantization as script


def test_the_table_has_a_line_a_teacher_and_a_figure_a_time(monkeypatch):
    monkeypatch.setattr(script, "ROWS", 4)
    lines = script.table(["assets/digits-flow"], ["int8", "fp8"]).splitlines()
    assert lines[0] == "| teacher | weights that are codes | int8 | fp8 |" and len(lines) == 3
    name, share, int8, fp8 = (cell.strip() for cell in lines[2].strip("|").split("|"))
    assert (name, share) == ("`assets/digits-flow`", "11%")
    eights, floats = ([float(value) for value in cell.removesuffix(" %").split(", ")] for cell in (int8, fp8))
    assert len(eights) == len(script.TIMES)
    assert all(0 < one < other < 1 for one, other in zip(eights, floats, strict=True))
