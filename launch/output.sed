# Removes what launchers add to the ranks' output and users need not read; see common.sh.

# horovodrun's traceback about a rank with a non-zero exit code: the line before it names the rank.
/^Traceback \(most recent call last\):$/{
    :traceback
    $!N
    /\n [^\n]*$/{
        $!b traceback
    }
    /\nRuntimeError: Horovod detected that one or more processes exited[^\n]*$/{
        $!N
        $!N
        $!N
        d
    }
}
# Its notices about ranks that ended with a code of ours (kept in the hold space), and about others that it then ended
# itself, as those that were still exiting, with SIGTERM (143) or, 5 s later, with SIGKILL (137). Its threads print at
# once, so that two notices may be on one line.
/^(Process [0-9]+ exit with status code [0-9]+\.|Terminating remaining workers after failure of Process [0-9]+\.)+$/{
    s/Terminating remaining workers after failure of Process [0-9]+\.//g
    /^$/d
    /code (2|3|4|75)\./h
    G
    /^(Process [0-9]+ exit with status code (2|3|4|75|137|143)\.)+\n.*code (2|3|4|75)\./d
    s/\n.*//
}
# What the shell of a rank says to that.
/^(\[[0-9]+\]<stderr>:)?(Terminated|.*: line [0-9]+: +[0-9]+ Terminated .*)$/d

# mpirun's notice about the same, if the code is one of ours: status.json has the reason.
/^-{60,}$/{
    $!N
    /processes exited with non-zero status/{
        :notice
        /\n-{60,}$/!{
            $!{
                N
                b notice
            }
        }
        /Exit code: +(2|3|4|75)\n/d
    }
}

# horovodrun prefixes each line with its rank; rank 0's lines are shown without the prefix.
s/^\[0\]<std(out|err)>://
