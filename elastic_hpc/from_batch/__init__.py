"""``--from-batch``: the elastic job of a batch script with a torchrun line. ``job`` reads the script's file, the other
modules are pure.

Start with ``job``, then ``convert``, which puts the parts together.

* ``shell_text``, ``variables``: statements, words and variables of a shell script, without running the script.
* ``reader``: which statement is the launch, and the set-up before it. ``launch_line``, ``wrappers``: the launch itself.
* ``shape``: nodes, workers, GPUs and cores of the job, from the #SBATCH lines and the launch.
"""
