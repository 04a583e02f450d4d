# Completes `python -m job …` in zsh. What python completes otherwise stays as it was.

(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }

_job_completion() {
    if [[ $words[2] != -m || $words[3] != job || $CURRENT -lt 4 ]]; then
        (( $+functions[_python] )) || autoload -Uz _python
        _python "$@"
        return
    fi
    local line value
    local -a whole begun
    for line in "${(@f)$(env _JOB_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args \
            _TYPER_COMPLETE_ARGS="job ${words[4,CURRENT]}" $words[1] -m job 2>/dev/null)}"; do
        value=${${line%%$'\t'*}//:/\\:}
        if [[ -z $line ]]; then continue
        elif [[ $value == *= ]]; then begun+=($value)
        elif [[ $line == *$'\t'* ]]; then whole+=("$value:${line#*$'\t'}")
        else whole+=($value)
        fi
    done
    if (( $#whole + $#begun )); then
        _describe 'python -m job' whole -- begun -S ''
    else
        _files
    fi
}

compdef _job_completion python python3 python3.11 python3.12
