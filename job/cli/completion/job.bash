# Completes `python -m job …` in bash. What python completes otherwise stays as it was.

_job_before=
_job_remember() {
    local spec
    if declare -F _comp_load >/dev/null; then _comp_load python
    elif declare -F _completion_loader >/dev/null; then _completion_loader python
    fi
    spec=$(complete -p python 2>/dev/null)
    if [[ $spec =~ -F\ ([^ ]+) && ${BASH_REMATCH[1]} != _job_completion ]]; then
        _job_before=${BASH_REMATCH[1]}
    fi
} 2>/dev/null
_job_remember

_job_completion() {
    if [[ ${COMP_WORDS[1]} != -m || ${COMP_WORDS[2]} != job || $COMP_CWORD -lt 3 ]]; then
        [[ -n $_job_before ]] && "$_job_before" "$@"
        return
    fi
    # Bash takes `a=b` apart into three words, and replaces the last of them only.
    local line=${COMP_LINE:0:COMP_POINT} IFS=$'\n'
    local current=${line##* } glued
    COMPREPLY=($(env _JOB_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args \
        _TYPER_COMPLETE_ARGS="job${line#* -m job}" "$1" -m job 2>/dev/null | cut -f 1))
    glued=${current%"${current##*[=:]}"}
    COMPREPLY=("${COMPREPLY[@]#"$glued"}")
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}

complete -o bashdefault -o default -F _job_completion python python3 python3.11 python3.12
