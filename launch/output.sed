# What launchers add to the ranks' output, and the user need not read; see common.sh.

# horovodrun's traceback about a rank that did not end with 0: the line before it says which one.
/^Traceback \(most recent call last\):$/{
    :traceback
    /\nExit code: /!{
        $!{
            N
            b traceback
        }
    }
    /Horovod detected that one or more processes exited/{
        $!N
        d
    }
}
/^Process [0-9]+ exit with status code (2|3|4|75)\.$/d
/^Terminating remaining ranks after failure of Process [0-9]+\.$/d

# mpirun's notice about the same, when the code is one of ours: status.json says it better.
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

# horovodrun puts the rank before each line; rank 0 speaks for the run without it.
s/^\[0\]<std(out|err)>://
