"""The command line, the launchers, and the one function that every rank runs."""

if __name__ != "cuboid.launch":
    raise ImportError("this folder is the package cuboid.launch; install the project (make install) and import that")
