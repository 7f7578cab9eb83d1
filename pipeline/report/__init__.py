"""One self-contained HTML page about a pipeline's run, and the README's table of the same numbers.

`inputs` reads what the other stages wrote, in the forms of `formats`; `summary`, `passage` and
`retained` turn it into what a section shows; `pictures` draws; `page` puts it together from
templates/, a file a section.
"""

from pipeline.report.inputs import read_curves, read_scores
from pipeline.report.page import write_report
from pipeline.report.summary import markdown_table

__all__ = ["markdown_table", "read_curves", "read_scores", "write_report"]
