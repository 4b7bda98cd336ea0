"""An engine whose workers train apart: when owners agree on weights, and what is seen in between."""

from contextlib import AbstractContextManager, nullcontext

from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.engine.comm.traffic import Traffic
from deepspeed_sdp.engine.lifetime import while_alive
from deepspeed_sdp.engine.zero.build import Parts
from deepspeed_sdp.engine.zero.outer_step import OuterStep


class LocalStepsFace:
    """Part of :class:`SDPEngine`. Without local steps owners agree in every step, and all of this does nothing."""

    sdp_config: SDPConfig
    global_steps: int
    _traffic: Traffic
    _parts: Parts | None
    _agreed_at: int
    _is_agreeing: bool

    @property
    def agreed_at(self) -> int:
        """The step after which owners agreed on weights for the last time; every one, but for local steps."""
        return self.global_steps if self._outer is None else self._agreed_at

    @while_alive
    def synchronize_workers(self) -> None:
        """Collective, between steps. With local steps (``schedule.sync_interval``): have owners agree on weights now.

        The engine does so itself every ``sync_interval`` steps, and before it re-partitions.
        """
        self._end_agreement()
        if self._outer is not None and self.agreed_at < self.global_steps:
            self._outer.step()
            self.__dict__["_agreed_at"] = self.global_steps

    def averaged(self) -> AbstractContextManager[None]:
        """Collective. Inside, weights are what owners would agree on now; afterwards training goes on as before."""
        outer = self._outer if self.agreed_at < self.global_steps else None
        return nullcontext() if outer is None else outer.averaged()

    @property
    def _outer(self) -> OuterStep | None:
        return None if self._parts is None else self._parts.outer

    def _agree_as_scheduled(self) -> None:
        """After a step: agree, or with a delay begin to, or end it."""
        if self._outer is None:
            return
        schedule = self.sdp_config.schedule
        place = self.global_steps % schedule.sync_interval
        if not schedule.sync_delay:
            if not place:
                self.synchronize_workers()
        elif not place:
            # A job may go on with another delay than it was saved with.
            self._end_agreement()
            self._outer.issue()
            self.__dict__["_is_agreeing"] = True
        elif place == schedule.sync_delay:
            self._end_agreement()
        self._traffic.extend_step()

    def _end_agreement(self) -> None:
        """What was issued at the end of a round, if it is still under way, is applied."""
        if self._outer is not None and self._is_agreeing:
            self._outer.apply()
            self.__dict__["_is_agreeing"] = False
