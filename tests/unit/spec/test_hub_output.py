"""An output on the hub stands for the keys that push there, and for a local folder."""

import pytest

from job.spec import hub_output
from job.spec.load import dump_resolved, load_spec
from tests.jobs import ROOT

LATEX = (ROOT / "specs" / "latex.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("uri", "branch", "folder"),
    [
        ("hf://org/name", None, "cache/outputs/org--name"),
        ("hf://org/name/", None, "cache/outputs/org--name"),
        ("hf://org/name@v2/try", "v2/try", "cache/outputs/org--name@v2--try"),
    ],
)
def test_an_output_on_the_hub_becomes_a_push_and_a_folder(
    uri: str, branch: str | None, folder: str
) -> None:
    loaded = load_spec(LATEX, "spec", ["runtime.cache_dir=cache", f"output.uri={uri}"], {})
    export = loaded.spec.export
    assert (export.push_to_hub, export.hub_model_id) == (True, "org/name")
    assert (export.hub_revision, export.hub_private_repo) == (branch, True)
    assert loaded.spec.output.uri == folder
    assert hub_output.is_output_of(loaded.spec)
    again = load_spec(dump_resolved(loaded), "again", (), {})
    assert again.spec == loaded.spec


def test_an_output_elsewhere_stays_what_it_is() -> None:
    sets = ["export.push_to_hub=true", "export.hub_model_id=org/name", "output.uri=s3://b/out"]
    loaded = load_spec(LATEX, "spec", sets, {})
    assert loaded.spec.output.uri == "s3://b/out"
    assert not hub_output.is_output_of(loaded.spec)
