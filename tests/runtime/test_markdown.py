"""Markdown tables, character by character."""

from __future__ import annotations

from pipeline.runtime.markdown import markdown_table


def test_cells_cannot_end_a_cell_or_a_row() -> None:
    table = markdown_table(["", "x|y"], [["a\nb", r"c\|d"]])
    assert table.split("\n") == ["|  | x\\|y |", "|---|---|", r"| a b | c\|d |"]


def test_numbers_stand_to_the_right() -> None:
    table = markdown_table(["run", "loss", "KL"], [["one", "2.5", ""]], numbers=True)
    assert table.split("\n") == ["| run | loss | KL |", "|---|---:|---:|", "| one | 2.5 |  |"]
