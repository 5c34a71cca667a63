"""How jobs are shown: the story of a job, from its record, and screens, pages and metrics made from the story. Pure.

Start with ``story`` (the runs, rounds and faults of a job) and ``job.JobView`` (a job at one moment), which all views
show.

* ``story_builder``: events -> story. ``account``: where the time of the nodes went. ``brought``: the gains and costs of
  growth. ``state``: which state a job is in.
* ``status``: table and card. ``why``, ``why_json``: the page of ``elastic-hpc why``, for people and for
  programs. ``metrics``: for Prometheus.
* ``scaling``: the speed by the number of nodes. ``plan``: the table of ``elastic-hpc plan``.
* ``timeline``, ``picture``: the page and image of ``elastic-hpc timeline``. ``live``: the pages of ``elastic-hpc
  serve``. ``times``: moments and durations as text.
"""
