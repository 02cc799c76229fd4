"""The record of a trial as JSON."""

import pytest

from pipeline.report.trial_record import TrialRecord


@pytest.mark.parametrize(
    "found", [{}, {"rows": ["x"]}, {"rows": [], "version": "2"}, {"rows": [], "curve": [{}]}]
)
def test_what_is_no_record_is_refused_in_one_line(found):
    with pytest.raises(ValueError, match="it is no record of a trial"):
        TrialRecord.from_json(found)
