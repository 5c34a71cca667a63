"""``elastic-hpc doctor``: what a site means for elastic jobs, by its settings and by a look from its nodes."""
