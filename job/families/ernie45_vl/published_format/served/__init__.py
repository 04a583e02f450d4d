"""The modules that vLLM runs beside the weights; they are copied into the exported folder.

They replace the published remote code: importing them downloads nothing, and images are cut into
patches by the same Transformers processor as in training. They may not import this project.
"""
