"""What vLLM runs beside the weights: these modules are copied into the exported folder.

They stand in for the published remote code: nothing is fetched when they are imported, and the
pictures are cut by the same processor of Transformers that the training used. They may import
nothing of this project.
"""
