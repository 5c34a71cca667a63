# ids of the jobs that were submitted from here, and of the jobs that elastic-hpc remembers
PREFIX_jobs() {
  local run
  for run in elastic-logs/*/; do
    [ -d "$run" ] && basename "$run"
  done
  tail -n 100 "${XDG_STATE_HOME:-$HOME/.local/state}/elastic_hpc/jobs" 2>/dev/null | sed 's|.*/||'
}

PREFIX_complete() {
  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
  local command='' script='' option='' word kind at
  COMPREPLY=()
  # bash takes "--nodes=2:4" apart into "--nodes", "=", "2", ":", "4"
  for ((at = 1; at < COMP_CWORD; at++)); do
    word=${COMP_WORDS[at]}
    if [[ $word == "=" || $word == ":" ]]; then
      ((at++))
    elif [[ $word == -* ]]; then
      [[ ${COMP_WORDS[at + 1]} != "=" && -n $(PREFIX_value "$command" "$word") ]] && ((at++))
    elif [[ -n $PREFIX_commands && -z $command ]]; then
      command=$word
    else
      script=$word
      break
    fi
  done

  if [[ -n $script && (-z $PREFIX_commands || " $PREFIX_with_job " != *" $command "*) ]]; then
    mapfile -t COMPREPLY < <(compgen -f -- "$current")
    compopt -o filenames 2>/dev/null
    return
  fi
  if [[ $current == "=" ]]; then
    option=$previous current=''
  elif [[ $previous == "=" ]]; then
    option=${COMP_WORDS[COMP_CWORD - 2]}
  elif [[ $previous == -* && -n $(PREFIX_value "$command" "$previous") ]]; then
    option=$previous
  fi
  if [[ -n $option ]]; then
    kind=$(PREFIX_value "$command" "$option")
    kind=${kind:-$(PREFIX_value "$command" "$option=")}
    case $kind in
    words*) mapfile -t COMPREPLY < <(compgen -W "${kind#words}" -- "$current") ;;
    folder) mapfile -t COMPREPLY < <(compgen -d -- "$current") ;;
    file) mapfile -t COMPREPLY < <(compgen -f -- "$current") ;;
    esac
    [[ $kind == words* ]] || compopt -o filenames 2>/dev/null
  elif [[ $current == -* ]]; then
    mapfile -t COMPREPLY < <(compgen -W "$(PREFIX_options "$command")" -- "$current")
  elif [[ -n $PREFIX_commands && -z $command ]]; then
    mapfile -t COMPREPLY < <(compgen -W "$PREFIX_commands" -- "$current")
  elif [[ " $PREFIX_with_job " == *" $command "* && -n $command ]]; then
    mapfile -t COMPREPLY < <({ compgen -W "$(PREFIX_jobs)" -- "$current"; compgen -d -- "$current"; } | sort -u)
  else
    mapfile -t COMPREPLY < <(compgen -f -X '!*.py' -- "$current"; compgen -d -- "$current")
    [[ ${#COMPREPLY[@]} -eq 0 ]] && mapfile -t COMPREPLY < <(compgen -f -- "$current")
    compopt -o filenames 2>/dev/null
  fi
}

complete -F PREFIX_complete COMMAND_NAME
