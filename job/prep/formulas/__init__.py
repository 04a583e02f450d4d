"""`builtin://formulas`: random formulas and their pictures, without end and without a download."""

from job.prep.formulas.render import FormulaSample, render_latex, sample, samples

__all__ = ["FormulaSample", "render_latex", "sample", "samples"]
