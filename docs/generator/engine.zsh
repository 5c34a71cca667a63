_elastic_script() {
  _files -g '*.py(-.)'
}

# ids of the jobs that were submitted from here, and of the jobs that elastic-hpc remembers
_elastic_job() {
  local -aU runs=(elastic-logs/*(N/:t))
  runs+=(${(f)"$(tail -n 100 ${XDG_STATE_HOME:-$HOME/.local/state}/elastic_hpc/jobs 2>/dev/null | sed 's|.*/||')"})
  _alternative "jobs:job:(${(j: :)runs})" 'folders:run directory:_files -/'
}
