"""The recipes that are shipped; `cuboid train NAME` finds them here."""

if __name__ != "cuboid.recipes":
    raise ImportError("this folder is the package cuboid.recipes; install the project (make install) and import that")
