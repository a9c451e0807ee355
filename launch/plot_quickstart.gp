# The curves of quickstart.sh. From the command line: curves, picture (.svg or .png), subject, best_column, best, best_step,
# muon_step (0: never), mark.
set datafile separator tab
stats curves using 1 skip 1 nooutput
steps = STATS_max
columns = STATS_columns
# The first tenth of the run is a wall that would flatten the rest.
stats curves using ($1 >= 0.08 * steps ? $2 : NaN) skip 1 nooutput
bottom = STATS_min
stats curves using ($1 >= 0.08 * steps ? column(best_column) : NaN) skip 1 nooutput
top = STATS_max

if (picture[strlen(picture) - 3:] eq '.png') {
    set terminal pngcairo size 800, 500 font 'DejaVu Sans,11'
} else {
    set terminal svg size 800, 500 font 'DejaVu Sans,Helvetica,Arial,sans-serif,13' background 'white'
}
set output picture

set title "Muon and AdamW: validation loss\n{/*0.85 " . subject . "}"
set xlabel 'optimizer step'
set ylabel 'validation loss [nats per byte]'
set xrange [0:steps]
set yrange [bottom - 0.06 * (top - bottom):top]
set grid linecolor '#dddddd' linetype 1
set border 3
set tics nomirror out
set key top right

set arrow 1 from 0, best to steps, best nohead dashtype 3 linewidth 1.5 linecolor '#777777'
if (muon_step > 0) {
    set arrow 2 from muon_step, best to muon_step, graph 0 nohead dashtype 3 linewidth 1.5 linecolor '#1f5fbf'
    set label 2 mark at muon_step, graph 0.05 offset 1, 0 textcolor '#1f5fbf'
} else {
    set label 2 mark at graph 0.05, graph 0.05 textcolor '#1f5fbf'
}
plot for [i = 3:columns] curves using 1:i with lines title columnheader(i) \
         linewidth (i == best_column ? 2.5 : 1.2) \
         linecolor rgb (i == best_column ? '#d1601f' : i % 2 ? '#e9b08c' : '#c9a37f') dashtype (i == best_column ? 1 : i), \
     curves using 1:2 with lines title columnheader(2) linewidth 3 linecolor '#1f5fbf'
