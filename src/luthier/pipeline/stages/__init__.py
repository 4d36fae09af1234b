"""The seven stages, one file each; `luthier.pipeline.run` drives them in order."""
