"""RecBole's own entry points, prepared for the compressed models."""

from recbole.quick_start import load_data_and_model as load_data_and_model
from recbole.quick_start import run_recbole as run_recbole
