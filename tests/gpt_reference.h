/* gpt_reference.h - the loss of launch/gpt's model written a second time, in fp64 and as plainly as
 * the definition, sharing nothing with it but the table of parameters. */
#ifndef GPT_REFERENCE_H
#define GPT_REFERENCE_H

#include "gpt/gpt.h"

/* Mean cross-entropy of windows [sequences, context + 1] under the model's parameters, nats. */
double gpt_reference_loss(const gpt *model, const gpt_shape *shape, const unsigned char *windows,
                          int sequences);

#endif
