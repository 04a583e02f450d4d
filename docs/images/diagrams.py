"""Draws the diagrams of the pages; `translate.py` makes the Chinese ones of them.

python -m docs.images.diagrams        (`make diagrams`)
"""

from collections.abc import Mapping
from pathlib import Path

from docs.images.canvas import INK, MARGIN, RED, WIDTH, Canvas, Diagram, Rows
from docs.images.fused import fused

IMAGES = Path(__file__).parent
FULL = WIDTH - 2 * MARGIN


def first_run(on: Canvas) -> str:
    on.box(20, 20, FULL, 44, "dark", "$ make run SPEC=specs/latex.yaml", mono=True)
    rows: Rows = (
        ("prep", "check the rows", "data/"),
        ("baseline", "evaluate before", "eval/baseline.json"),
        ("train", "LoRA", "checkpoints/, adapter/"),
        ("eval", "evaluate after", "eval/final.json"),
        ("export", "merge, verify", "merged/"),
        ("report", "a page for people", "report.html"),
    )
    top = 86
    for number, (stage, does, leaves) in enumerate(rows):
        y = top + 72 * number
        on.box(20, y, 180, 54, "blue", stage, does)
        on.box(246, y + 8, 214, 38, "green", "", leaves)
        on.arrow(f"M200 {y + 27}H244")
        if number:
            on.arrow(f"M110 {y - 18}V{y - 2}")
    end = on.note(
        top + 72 * len(rows) + 16,
        "Stopped at any point, the same command resumes: complete stages are skipped, and training "
        "continues from its newest checkpoint.",
    )
    return on.svg(
        end,
        "One command, six stages",
        "The run command validates the spec, then runs prep, baseline, train, eval, export and "
        "report; each leaves files at the output, and _SUCCESS comes last.",
    )


def notebook(on: Canvas) -> str:
    rows: Rows = (
        ("pip install …", "make setup", "one lock, torch from your index"),
        ("from_pretrained", "model:", "read without remote code"),
        ("get_peft_model", "lora:", "the same names, and the experts"),
        ("load_dataset", "data:", "checked rows, held-out rows"),
        ("generate, before", "eval:", "evaluated before and after"),
        ("compute_loss", "train:", "router_aux_loss_coef: 0"),
        ("SFTConfig, train", "train:, output:", "mostly the same names"),
        ("save_pretrained…", "export:", "adapter, merged weights"),
    )
    on.text(20, 34, "notebook cells", size=15, fill=INK, bold=True)
    on.text(226, 34, "what replaces them", size=15, fill=INK, bold=True)
    for number, (cell, key, remark) in enumerate(rows):
        y = 50 + 62 * number
        on.box(20, y, 170, 48, "orange", "", "")
        on.text(105, y + 29, cell, anchor="middle", mono=True, fill=INK)
        on.box(226, y, 234, 48, "blue", key, remark)
        on.arrow(f"M190 {y + 24}H224")
    return on.svg(
        50 + 62 * len(rows) + 8,
        "From cells to a spec",
        "Eight kinds of cells of the notebook on the left, and the section of the spec or the "
        "command that replaces each on the right.",
    )


def flow(on: Canvas) -> str:
    rows: Rows = (
        ("spec", "validated YAML"),
        ("storage", "read by URI"),
        ("prep", "checked rows"),
        ("families", "rows → tensors"),
        ("engines", "the model"),
    )
    for number, (package, does) in enumerate(rows):
        y = 20 + 70 * number
        on.box(150, y, 180, 52, "grey", package, does)
        on.arrow(f"M240 {y + 52}V{y + 68}") if number < len(rows) - 1 else None
    y = 20 + 70 * len(rows) + 16
    parts: Rows = (("train", "adapter"), ("evaluation", "before and after"), ("export", "verified"))
    for number, (package, does) in enumerate(parts):
        x = 20 + 150 * number
        on.box(x, y, 140, 52, "blue", package, does)
        on.arrow(f"M240 {y - 34}L{x + 70} {y - 2}")
        on.arrow(f"M{x + 70} {y + 52}L{240 if number == 1 else 180 + 60 * number} {y + 84}")
    on.box(150, y + 86, 180, 52, "green", "artifacts", "published")
    return on.svg(
        y + 158,
        "Data flows one way",
        "From the spec through storage, prep, families and engines to train, evaluation and "
        "export, and from these to the artifacts at the output.",
    )


def stage(on: Canvas) -> str:
    on.box(20, 20, 280, 70, "blue", "fingerprint", "code version, the stage’s keys,", "digests")
    on.box(20, 118, 280, 70, "blue", "read .stages/NAME.json", "same fingerprint, and every file?")
    on.box(340, 118, 120, 70, "green", "next stage")
    on.arrow("M160 90V116")
    on.arrow("M300 153H338")
    on.text(319, 144, "yes", anchor="middle")
    on.arrow("M160 188V222")
    on.text(170, 210, "no")
    steps: Rows = (
        ("red", "1  remove marker", "its files no longer count"),
        ("grey", "2  run", "in an empty local folder"),
        ("grey", "3  upload", "file by file, each atomically"),
        ("green", "4  write marker", "every file with its SHA-256"),
        ("grey", "5  clean up", "stale files of an earlier run"),
    )
    for number, (kind, title, line) in enumerate(steps):
        y = 224 + 70 * number
        on.box(20, y, 280, 52, kind, title, line)
        if number:
            on.arrow(f"M160 {y - 18}V{y - 2}")
    on.arrow("M300 530H440V190")
    on.text(432, 520, "done", anchor="end")
    on.arrow("M310 228H318V430H310", red=True, tip=False)
    for row, text in enumerate(("stopped here:", "no marker, so", "it runs again")):
        on.text(328, 316 + 20 * row, text, fill=RED, size=13)
    end = on.note(
        590,
        "Training does not start over: it resumes from the newest intact checkpoint with the same "
        "fingerprint.",
    )
    return on.svg(
        end,
        "The life of a stage",
        "A stage is skipped if its marker has its fingerprint and its files exist; otherwise the "
        "marker is removed first and written last.",
    )


def your_data(on: Canvas) -> str:
    on.box(
        20,
        20,
        230,
        112,
        "grey",
        "your files",
        "jsonl, json, csv, tsv,",
        "parquet, arrow, tars,",
        "folders; local, s3://, hf://",
    )
    steps: Rows = (
        ("columns", "a record becomes", "a conversation", "missing column", "ends the job"),
        ("check", "images open,", "an answer is there", "rejected", "with its reason"),
        ("split", "held-out rows,", "out of training", "leaked", "counted"),
        ("train rows", "data/train-*.arrow", "", "too long", "counted in training"),
    )
    for number, (title, one, two, lost, how) in enumerate(steps):
        y = 160 + 100 * number
        height = 72 if two else 54
        lines = (one, two) if two else (one,)
        on.box(20, y, 230, height, "blue" if two else "green", title, *lines)
        on.box(300, y, 160, 54, "red", lost, how)
        on.arrow(f"M135 {y - 28}V{y - 2}")
        on.arrow(f"M250 {y + 27}H298", red=True)
    on.box(20, 536, 230, 54, "green", "held-out rows", "data/eval-*.arrow")
    on.arrow("M20 396H10V563H18")
    end = on.note(
        622,
        "More rejected rows than data.max_bad_rows, none by default, end the job before anything "
        "is trained.",
    )
    return on.svg(
        end,
        "From files to rows",
        "Files are read as a stream, their records become conversations, each is checked; rejected "
        "rows, leaked rows and rows that are too long leave on the way and are counted.",
    )


def serving(on: Canvas) -> str:
    on.text(20, 34, "the output of a run", size=15, fill=INK, bold=True)
    outputs: Rows = (
        ("merged/", "everything trained", "green"),
        ("adapter-vllm/", "attention only", "green"),
        ("adapter/", "PEFT’s names", "red"),
    )
    for number, (name, what, kind) in enumerate(outputs):
        on.box(20 + 150 * number, 48, 140, 54, kind, name, what)
    on.box(20, 134, 290, 72, "blue", "job fetch", "finished runs only,", "every file by SHA-256")
    on.arrow("M90 102V132")
    on.arrow("M240 102V132")
    on.arrow("M390 102V132", red=True)
    for line, text in enumerate(("vLLM would take it", "and ignore it:", "it is for PEFT")):
        on.text(390, 152 + 20 * line, text, fill=RED, anchor="middle")
    on.box(20, 236, 140, 54, "blue", "vLLM", "merged weights")
    on.box(170, 236, 140, 54, "blue", "vLLM + base", "--enable-lora")
    on.arrow("M90 206V234")
    on.arrow("M240 206V234")
    on.box(20, 322, 290, 54, "blue", "job ask", "sends an image, prints the answer")
    on.arrow("M90 290V320")
    on.arrow("M240 290V320")
    return on.svg(
        396,
        "Two ways to vLLM",
        "Merged weights are fetched and served alone; the adapter under vLLM's names is served "
        "beside its base, for language attention only; adapter/ with PEFT's names is not for vLLM.",
    )


def cluster(on: Canvas) -> str:
    on.text(20, 32, "your namespace (Pod Security: restricted)")
    on.frame(12, 42, 456, 454)
    inputs: Rows = (
        ("ConfigMap", "the spec"),
        ("Secret", "tokens, keys"),
        ("PVC", "/cache"),
    )
    for number, (name, what) in enumerate(inputs):
        x = 24 + 148 * number
        on.box(x, 56, 136, 54, "grey", name, what)
        on.arrow(f"M{x + 68} {112 if name == 'PVC' else 110}V138", both=name == "PVC")
    does = (
        "one pod, one GPU, user 10001",
        "doctor checks first, then",
        "prep → train → eval → export",
        "scratch: /work, /tmp, /dev/shm",
        "exit code → failure policy",
        "SIGTERM → checkpoint, exit 143",
    )
    on.box(24, 140, 432, 150, "blue", "Job", *does)
    on.box(24, 330, 300, 72, "blue", "Deployment + Service", "job fetch, then vLLM on port 8000")
    on.box(24, 432, 300, 54, "grey", "smoke Job, clients", "job ask, with an image")
    on.arrow("M174 432V404")
    on.text(184, 423, "HTTP")
    on.text(20, 528, "outside, by TCP 443")
    on.box(24, 540, 170, 72, "grey", "model hub", "checkpoint,", "data sets")
    on.box(214, 540, 242, 72, "grey", "bucket", "data in; checkpoints,", "adapter, merged/ out")
    on.arrow("M20 576H4V215H22")
    on.arrow("M440 540V292", both=True)
    on.arrow("M380 540V366H326")
    return on.svg(
        632,
        "What talks to what",
        "In the namespace a Job reads its spec, credentials and cache, fetches the model from the "
        "hub and data from the bucket, and writes results to the bucket; vLLM fetches the merged "
        "weights from the bucket and is queried by a smoke Job and by clients",
    )


DIAGRAMS: Mapping[str, Diagram] = {
    "first-run": first_run,
    "notebook": notebook,
    "flow": flow,
    "stage": stage,
    "your-data": your_data,
    "serving": serving,
    "cluster": cluster,
    "fused": fused,
}


def main() -> None:
    for name, draw in DIAGRAMS.items():
        (IMAGES / f"{name}.svg").write_text(draw(Canvas()), encoding="utf-8")


if __name__ == "__main__":
    main()
