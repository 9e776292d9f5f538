"""docs/models.md says what works on which family, and that is so."""

import jobs
import pytest

pytestmark = pytest.mark.slow


def test_the_page_has_every_family():
    assert list(jobs.on_page()) == list(jobs.FAMILIES)


@pytest.mark.parametrize("kind", jobs.FAMILIES)
def test_every_job_on_a_family_is_as_the_page_says(kind, stories):
    assert jobs.outcomes(kind, stories) == jobs.on_page()[kind]
