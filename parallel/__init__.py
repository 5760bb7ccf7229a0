"""The floor: how tensors, layers and ranks are divided. Knows no recipe, tracker or model loader."""

if __name__ != "cuboid.parallel":
    raise ImportError("this folder is the package cuboid.parallel; install the project (make install) and import that")
