"""The reinforce stage: GRPO on the trained adapter, by rewards that can be checked.

Imports: spec, telemetry, prep, families, engines, train, evaluation, rewards.
"""
