"""`builtin://formulas`: an endless source of random formulas and their images, offline."""

from job.prep.formulas.render import FormulaSample, render_latex, sample, samples

__all__ = ["FormulaSample", "render_latex", "sample", "samples"]
