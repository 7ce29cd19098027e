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
# Its threads print at once, so that two notices may be on one line.
/^(Process [0-9]+ exit with status code (2|3|4|75)\.|Terminating remaining workers after failure of Process [0-9]+\.)+$/d

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
