"""Checks of what is pushed to the hub."""

import re
from collections.abc import Iterator

from job.spec import hub_output, keys
from job.spec.problems import Finding
from job.spec.rules.view import Rule, View, finding

MAIN = "main"
_BRANCH = "fine-tuned"
_INPUT = re.compile(rf"{hub_output.HUB}(?P<id>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>[^/\s]+))?(?:/|$)")


def _output_on_the_hub_is_a_repository(at: View) -> Iterator[Finding]:
    uri = at("output.uri")
    if uri.startswith(hub_output.HUB) and hub_output.parse(uri) is None:
        yield finding(
            "output.uri",
            "must be a model repository, without a folder in it, to be pushed to",
            "write hf://org/name or hf://org/name@branch; other folders can be a path or s3://",
        )


def _pushing_names_a_repository(at: View) -> Iterator[Finding]:
    if at("export.push_to_hub") and not at("export.hub_model_id") and not _pushes_output(at):
        yield finding(
            "export.hub_model_id",
            "must name the repository if export.push_to_hub is true",
            "set export.hub_model_id: org/name",
        )


def _settings_apply_to_a_push(at: View) -> Iterator[Finding]:
    if at("export.push_to_hub") or _pushes_output(at):
        return
    for name in ("hub_model_id", "hub_private_repo", "hub_revision", "hub_content"):
        if at(f"export.{name}") != keys.default(f"export.{name}"):
            yield finding(
                f"export.{name}",
                "applies only if export.push_to_hub is true",
                "set export.push_to_hub: true, or remove the line",
            )


def _output_and_settings_agree(at: View) -> Iterator[Finding]:
    target = hub_output.parse(at("output.uri"))
    if target is None:
        return
    for name, value in zip(("hub_model_id", "hub_revision"), target, strict=True):
        own = at(f"export.{name}")
        if own is not None and own != value:
            yield finding(
                f"export.{name}",
                "differs from the repository in output.uri",
                "remove the line, or set output.uri to a path or an s3:// URI",
            )


def _what_is_pushed_exists(at: View) -> Iterator[Finding]:
    if not (at("export.push_to_hub") or _pushes_output(at)):
        return
    content, full = at("export.hub_content"), at("lora.method") == "full"
    if full and content in ("adapter", "all"):
        yield finding(
            "export.hub_content",
            "must be merged or auto if lora.method is full, which trains no adapter",
            "remove the line",
        )
    if content in ("merged", "all") and not at("export.merged.enabled"):
        yield finding(
            "export.hub_content",
            "needs export.merged.enabled: true",
            "set export.merged.enabled: true, or hub_content: adapter",
        )


def _push_replaces_no_input(at: View) -> Iterator[Finding]:
    """A push removes the weights that its branch had: those of the base, or of the adapter."""
    target = _target(at)
    if target is None:
        return
    repository, branch = target
    for dotted in ("model.model_name_or_path", "model.adapter_name_or_path"):
        match = _INPUT.match(at(dotted) or "")
        own = at("model.revision") if dotted == "model.model_name_or_path" else None
        if match is None or match["id"].lower() != repository.lower():
            continue
        if (own or match["revision"] or MAIN) == branch:
            other = _BRANCH if branch != _BRANCH else f"{_BRANCH}-2"
            dotted_target, write = "export.hub_model_id", f"set export.hub_revision: {other}"
            if _pushes_output(at):
                dotted_target, write = "output.uri", f"write {hub_output.HUB}{repository}@{other}"
            yield finding(
                dotted_target,
                f"must not be the repository and branch of {dotted}, which the push would replace",
                f"{write}, or name another repository",
            )
            return


def _target(at: View) -> tuple[str, str] | None:
    """The repository and branch that the export is pushed to, if any."""
    output = hub_output.parse(at("output.uri"))
    if output is not None:
        return output[0], output[1] or at("export.hub_revision") or MAIN
    repository = at("export.hub_model_id")
    if not at("export.push_to_hub") or not repository:
        return None
    return repository, at("export.hub_revision") or MAIN


def _pushes_output(at: View) -> bool:
    return hub_output.parse(at("output.uri")) is not None


RULES: tuple[Rule, ...] = (
    _output_on_the_hub_is_a_repository,
    _pushing_names_a_repository,
    _settings_apply_to_a_push,
    _output_and_settings_agree,
    _what_is_pushed_exists,
    _push_replaces_no_input,
)
