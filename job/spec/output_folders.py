"""The folders that a run writes in its output."""

ADAPTER, SERVED_ADAPTER, WEIGHTS = "adapter", "adapter-vllm", "weights"
"""What was trained: an adapter in PEFT's format, the same one for vLLM, or all weights."""
REINFORCED = "reinforced"
"""Of the stage `reinforce`; its adapter is in folders of the same names below this one."""
MERGED = "merged"
LOGS = "logs"
"""The files of trackers."""
FOLDERS = (
    *("data", "checkpoints", "train", "eval", ADAPTER, SERVED_ADAPTER, WEIGHTS, REINFORCED),
    *(MERGED, LOGS, ".stages", ".lease"),
)
