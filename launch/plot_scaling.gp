# Steps of several models over ranks, as `muonshard plan --machine` simulates them: docs/pictures/scaling.png. From the command
# line: data (blocks "MODEL", then "RANKS MS FITS" a line, two empty lines between), picture, subject.
set terminal pngcairo size 1200, 800 font 'DejaVu Sans,12' fontscale 1.3 linewidth 1.4
set output picture
set title subject
set xlabel 'ranks'
set ylabel 'optimizer step, nothing hidden under a backward pass [ms]'
set logscale xy 2
set logscale y 10
set xtics 4
set grid linecolor '#dddddd' linetype 1
set border 3
set tics nomirror out
set key outside right
stats data using 1 nooutput
array colours[6] = ['#1f5fbf', '#5fa8d3', '#2e8b57', '#d1601f', '#8e6fb5', '#c0392b']
plot for [i = 0:5] data index i using 1:2 with lines dashtype 2 linewidth 2 linecolor rgb colours[i + 1] notitle, \
     for [i = 0:5] data index i using 1:($3 == 1 ? $2 : NaN) with points pointtype 7 pointsize 1.2 linecolor rgb colours[i + 1] title columnheader(1), \
     for [i = 0:5] data index i using 1:($3 == 0 ? $2 : NaN) with points pointtype 6 pointsize 1.2 linecolor rgb colours[i + 1] notitle, \
     NaN with points pointtype 7 linecolor rgb '#777777' title 'fits into memory', \
     NaN with points pointtype 6 linecolor rgb '#777777' title 'does not'
