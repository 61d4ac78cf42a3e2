"""Step 5: configurations, what workers do with them, their results, and what is shown of these."""

from fhe_mlp.experiments.configuration import P_ERROR, ROUNDING_BITS, Experiment, Terms, public_map, versions
from fhe_mlp.experiments.figures import save_figure
from fhe_mlp.experiments.jobs import compiled
from fhe_mlp.experiments.report import OURS, Draws, Report, summarize
from fhe_mlp.experiments.results import Results
from fhe_mlp.experiments.steps import read_beside
from fhe_mlp.experiments.tasks import (
    ALONE,
    Task,
    compile_all,
    encrypt_all,
    find_tasks,
    measure_all,
    predict,
    print_plan,
)
from fhe_mlp.experiments.workbooks import columns_of, meanings, settings_sheet, write_workbook
