"""Electrocardiograms: records to leads and beats, beats to features, decisions to the figures of EC57."""

from fhe_mlp.ecg.beats import fill_missing, rr_known, single_beats
from fhe_mlp.ecg.evaluation import (
    FIGURES,
    balanced_accuracy,
    by_record,
    choose_threshold,
    columns,
    figures,
    intervals,
)
from fhe_mlp.ecg.features import FEATURES, PUBLISHED, band_pass, beat_features, find_extremum, published_features
from fhe_mlp.ecg.physionet import provide_records
from fhe_mlp.ecg.records import (
    AAMI_CLASSES,
    CLASS_OF_SYMBOL,
    EXPECTED_LEADS,
    LEADS,
    MILLIVOLTS,
    Unsuited,
    are_expected,
    check_rate,
    choose_leads,
    ecg_signals,
    find_beats,
    find_breaks,
    lead_name,
    read_annotations,
    read_signal,
    upright_first,
)
