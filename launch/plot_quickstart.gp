# The curves of quickstart.sh. From the command line: curves, picture, subject, best_column, best, muon_step
# (0: never), mark.
set datafile separator tab
stats curves using 1 skip 1 nooutput
steps = STATS_max
columns = STATS_columns
# The first steps are a wall that would flatten the rest.
stats curves using ($1 >= 0.08 * steps ? $2 : NaN) skip 1 nooutput
bottom = STATS_min
stats curves using ($1 >= 0.08 * steps ? column(best_column) : NaN) skip 1 nooutput
top = STATS_max

set terminal pngcairo size 1200, 750 font 'DejaVu Sans,12' fontscale 1.4 linewidth 1.4
set output picture

set title "Muon and AdamW: validation loss\n{/*0.85 " . subject . "}"
set xlabel 'optimizer step'
set ylabel 'validation loss [nats per byte]'
set xrange [0:steps]
set yrange [bottom - 0.06 * (top - bottom):top]
set grid linecolor '#dddddd' linetype 1
set border 3
set tics nomirror out
set format y '%.1f'
set key top right

grey = '#777777'
blue = '#1f5fbf'
set arrow 1 from 0, best to steps, best nohead dashtype 3 linewidth 1.5 linecolor rgb grey
set label 1 sprintf("AdamW's best: %.3f", best) at graph 0.015, first best offset 0, 0.6 textcolor rgb grey
set label 2 mark at graph 0.015, graph 0.1 textcolor rgb blue
if (muon_step > 0) {
    set arrow 2 from muon_step, best to muon_step, graph 0 nohead dashtype 3 linewidth 1.5 linecolor rgb blue
}
do for [i = 3:columns] {
    set style line i linewidth 1.5 linecolor '#dd9d6c' dashtype i - 1
}
set style line best_column linewidth 2.5 linecolor '#d1601f' dashtype 1
plot curves using 1:2 with lines linewidth 3 linecolor rgb blue title columnheader(2), \
     for [i = 3:columns] curves using 1:i with lines linestyle i title columnheader(i)
