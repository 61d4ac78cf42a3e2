"""Electrocardiograms: records to leads and beats, beats to features, decisions to the figures of EC57."""

from fhe_mlp.ecg.beats import (
    AAMI_CLASSES,
    CLASS_OF_SYMBOL,
    Unsuited,
    fill_missing,
    find_beats,
    find_breaks,
    rr_known,
    single_beats,
)
from fhe_mlp.ecg.evaluation import (
    FIGURES,
    LEAST_BEATS,
    balanced_accuracy,
    by_record,
    choose_threshold,
    columns,
    figures,
)
from fhe_mlp.ecg.features import FEATURES, PUBLISHED, band_pass, beat_features, find_extremum, published_features
from fhe_mlp.ecg.physionet import DS1, DS2, provide_records
from fhe_mlp.ecg.records import (
    EXPECTED_LEADS,
    LEADS,
    Signals,
    are_expected,
    beside,
    lead_name,
    plain_unit,
    read_annotations,
    read_signal,
    two_leads,
)
