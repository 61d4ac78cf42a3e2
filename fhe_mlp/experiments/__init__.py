"""Step 5: configurations, what workers do with them, their results, and what is shown of these."""

from fhe_mlp.experiments.configuration import P_ERROR, ROUNDING_BITS, Draws, Experiment, load_configuration, versions
from fhe_mlp.experiments.figures import save_figure
from fhe_mlp.experiments.report import OURS, Report, read_beside
from fhe_mlp.experiments.results import Results
from fhe_mlp.experiments.workbooks import meanings, settings_sheet, write_workbook
