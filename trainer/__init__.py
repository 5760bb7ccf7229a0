"""How a run goes: recipe, model, data, assembly, engine, loop, checkpoints, tracking."""

if __name__ != "cuboid.trainer":
    raise ImportError("this folder is the package cuboid.trainer; install the project (make install) and import that")
