# Completes `python -m job …` in fish. What python completes otherwise stays as it was.

function __job_asked
    set -l words (commandline -opc)
    test (count $words) -ge 3; and test "$words[2]" = -m; and test "$words[3]" = job
end

function __job_candidates
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l found (env _JOB_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args \
        _TYPER_COMPLETE_ARGS="job $words[4..-1] $current" $words[1] -m job 2>/dev/null)
    if test -n "$found"
        printf '%s\n' $found
    else
        __fish_complete_path $current
    end
end

for python in python python3 python3.11 python3.12
    complete -c $python -n __job_asked -f -a '(__job_candidates)'
end
