"""One self-contained HTML page about a run of the pipeline, and the same numbers for the README.

`read_inputs` reads the results of the other stages; `summary`, `passage_view` and `retained` turn
them into the content of sections; `pictures` draws figures; `page` assembles the page from
templates/, one file per section.
"""

from pipeline.report.page import write_report
from pipeline.report.read_inputs import read_curves, read_scores
from pipeline.report.summary import scores_markdown

__all__ = ["read_curves", "read_scores", "scores_markdown", "write_report"]
