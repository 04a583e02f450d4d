"""Rewards of generated answers, by name: what reinforcement learning raises.

Imports: spec, distributed, prep, evaluation.
"""
